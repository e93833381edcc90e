"""Worker processes: how they end, and what that leaves behind."""

import asyncio

import pytest

from megatron_keye.errors import KeyeError
from megatron_keye.io_server.pool import PoolSettings, Worker
from megatron_keye.io_server.worker import WorkerLimits
from tests.unit.io_server.serving import FAKE_WORKER, MIB


def settings_of(tmp_path, command=FAKE_WORKER, **changes) -> PoolSettings:
    given = dict(num_workers=1, queue_jobs=4, roots=(str(tmp_path),), limits=WorkerLimits(512 * MIB, 10.0), command=command)
    return PoolSettings(**given | changes)


def test_a_worker_that_does_not_start_leaves_its_own_code(tmp_path, caplog):
    async def scenario():
        for code in range(1, 30):
            with pytest.raises(KeyeError, match=f"did not start .code {code}.;"):
                await Worker.start(settings_of(tmp_path, ("sh", "-c", f"exit {code}")), "id")

    asyncio.run(scenario())
    assert not caplog.records
