"""Worker processes: how they end, and what that leaves behind."""

import asyncio
from contextlib import suppress

import pytest

from megatron_keye.data.slabs import Slab
from megatron_keye.errors import KeyeError, SettingsError
from megatron_keye.io_server.pool import PoolSettings, Worker, WorkerPool, identify
from megatron_keye.io_server.worker import WorkerLimits
from tests.unit.io_server.serving import FAKE_WORKER, MIB, job_for


def settings_of(tmp_path, command=FAKE_WORKER, **changes) -> PoolSettings:
    given = dict(num_workers=1, queue_jobs=4, roots=(str(tmp_path),), limits=WorkerLimits(512 * MIB, 10.0), command=command)
    return PoolSettings(**given | changes)


@pytest.mark.parametrize(("code", "kind"), [(65, SettingsError), (1, KeyeError)])
def test_a_decoder_that_cannot_be_used_says_why_and_whether_to_try_again(code, kind):
    with pytest.raises(KeyeError, match=f"cannot be used .code {code}.: no such library") as failure:
        asyncio.run(identify(("sh", "-c", f"echo no such library; exit {code}")))
    assert type(failure.value) is kind


def test_a_worker_that_does_not_start_leaves_its_own_code(tmp_path, caplog):
    async def scenario():
        for code in range(1, 30):
            with pytest.raises(KeyeError, match=f"did not start .code {code}.:"):
                await Worker.start(settings_of(tmp_path, ("sh", "-c", f"exit {code}")), "id")

    asyncio.run(scenario())
    assert not caplog.records


def test_jobs_that_are_cut_at_the_end_start_no_workers(tmp_path, write, monkeypatch):
    async def scenario():
        started = []

        async def start(settings, decoder_id):
            started.append(await original(settings, decoder_id))
            return started[-1]

        original = Worker.start
        monkeypatch.setattr(Worker, "start", start)
        pool = WorkerPool(settings_of(tmp_path, num_workers=2))
        await pool.start()
        job = job_for(write("hang"))
        asking = [asyncio.create_task(pool.run(job.model_dump_json(), Slab(job.result_bytes))) for _ in range(2)]
        while pool.running < 2:
            await asyncio.sleep(0.01)
        asking[0].cancel()
        await asyncio.sleep(0.1)
        await pool.close()
        for task in asking:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        assert len(asyncio.all_tasks()) == 1
        assert len(started) == 2
        assert all(worker.process.returncode == -9 for worker in started)

    asyncio.run(scenario())
