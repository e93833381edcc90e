"""Small parts on their own: keys and sizes of jobs, choice of servers, leases, slabs, results that are kept."""

import asyncio
import fcntl
import gc
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.errors import SettingsError
from megatron_keye.io_server.auth import load_secret
from megatron_keye.io_server.fleet import FAILURES_TO_OPEN, OPEN_S, Breaker, Fleet, Places, Server, rendezvous
from megatron_keye.io_server.metrics import Metrics
from megatron_keye.io_server.protocol import DecodeJob, Refused, is_server_url, parse_job
from megatron_keye.io_server.registry import (
    DEAD_S,
    LEASE_S,
    REREAD_S,
    lease_path,
    live_leases,
    remove_dead_leases,
    remove_lease,
    write_lease,
)
from megatron_keye.io_server.results import Results
from megatron_keye.io_server.slabs import SlabBudget

SLOW_FAST = DecodeJob(
    path="/data/0.tar", offset=512, num_bytes=9, sha256="0" * 64, variant="keye_vl_1_5", height=90, width=60, sizes=((84, 56), (56, 28)),
    frames=(0, 4, 9), fast=(False, True, False), decoder_id="d",
)  # fmt: skip
OTHER_VALUES = {
    "path": "/data/1.tar", "offset": 0, "num_bytes": 8, "sha256": "1" * 64, "height": 91, "width": 61, "sizes": ((84, 56), (28, 28)),
    "frames": (0, 4, 8), "fast": (False, False, True), "decoder_id": "e",
}  # fmt: skip


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_job_survives_the_wire_and_knows_its_size():
    assert parse_job(SLOW_FAST.model_dump_json().encode()) == SLOW_FAST
    assert SLOW_FAST.segments == (24, 8, 24)
    assert SLOW_FAST.result_bytes == 56 * 588
    clip = SLOW_FAST.model_copy(update=dict(variant="keye_vl_preview", fast=()))
    assert clip.segments == (24,)  # 3 frames of the second size, 56 x 28
    image = SLOW_FAST.model_copy(update=dict(frames=None, fast=(), sizes=((84, 56),)))
    assert image.segments == (24,)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_jobs_that_differ_have_keys_that_differ(name):
    assert SLOW_FAST.model_copy(update={name: OTHER_VALUES[name]}).key != SLOW_FAST.key
    assert parse_job(SLOW_FAST.model_dump_json().encode()).key == SLOW_FAST.key


@given(st.binary(min_size=32, max_size=32), st.sets(st.integers(0, 50), min_size=2, max_size=8))
def test_a_lost_server_moves_only_its_own_keys(key, numbers):
    urls = [f"http://node{number}:7300" for number in numbers]
    order = rendezvous(key, urls)
    assert sorted(order) == sorted(urls)
    for lost in urls:
        assert rendezvous(key, [url for url in urls if url != lost]) == [url for url in order if url != lost]


def test_keys_spread_over_servers():
    urls = [f"http://node{number}:7300" for number in range(4)]
    first = [rendezvous(number.to_bytes(32, "big"), urls)[0] for number in range(4000)]
    assert all(850 < first.count(url) < 1150 for url in urls)


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_decide_later():
    breaker = Breaker(clock := Clock())
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed()
    breaker.succeeded()
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert not breaker.allows()
    clock.now_s += OPEN_S
    assert breaker.allows()
    breaker.failed()  # a single one is enough now
    assert not breaker.allows()
    clock.now_s += OPEN_S
    assert breaker.allows()
    breaker.asked()
    assert not breaker.allows()  # one request is under way
    breaker.succeeded()
    breaker.asked()
    assert breaker.allows()
    breaker.failed()
    assert breaker.allows()


def test_places_are_given_to_who_waits_longest():
    places = Places()
    places.free()  # of which nobody knows
    first, second, third = (places.queue(first=False) for _ in range(3))
    returned = places.queue(first=True)
    assert not any(turn.done() for turn in (returned, first, second, third))
    places.free()
    assert places.leave(returned)
    assert not places.leave(first)
    places.free()
    assert second.done() and not third.done()
    assert places.leave(second) and not places.leave(third)
    places.free()


def test_a_server_that_is_left_alone_is_logged_once_until_it_works_again(caplog):
    server = Server("http://a:1", Breaker(clock := Clock()))

    def logged() -> list[str]:
        return [record.getMessage() for record in caplog.records]

    for _ in range(FAILURES_TO_OPEN):
        assert not logged()
        server.failed("http://a:1: refused")
    assert logged() == ["a server is left alone, and tried again every 30 s: http://a:1: refused"]
    clock.now_s += OPEN_S
    server.failed("http://a:1: refused")
    server.trip("http://a:1: denied")
    assert len(logged()) == 1
    server.breaker.succeeded()
    server.trip("http://a:1: denied")
    assert logged()[1:] == ["a server is left alone, and tried again every 30 s: http://a:1: denied"]


def urls_after_a_while(fleet, clock) -> set[str]:
    clock.now_s += REREAD_S
    fleet.ranked(b"key")
    fleet._news._reader.join(10)
    return {server.url for server in fleet.ranked(b"key")}


def test_a_fleet_follows_its_registry_and_asks_no_server_that_decodes_otherwise(tmp_path, caplog):
    fleet = Fleet(("http://fixed:1",), tmp_path, "mine", clock=(clock := Clock()))
    write_lease(tmp_path, "http://a:1", "mine", 1)
    write_lease(tmp_path, "http://b:1", "other", 1)
    for _ in range(2):
        urls_after_a_while(fleet, clock)
    (said,) = caplog.records
    assert said.getMessage() == "servers that decode otherwise than mine are not asked: http://b:1"
    assert {server.url for server in fleet.ranked(b"key")} == {"http://fixed:1", "http://a:1"}
    failing = next(server for server in fleet.ranked(b"key") if server.url == "http://a:1")
    failing.breaker.trip()
    write_lease(tmp_path, "http://c:1", "mine", 1)
    remove_lease(tmp_path, "http://b:1")
    assert {server.url for server in fleet.ranked(b"key")} == {"http://fixed:1"}
    assert urls_after_a_while(fleet, clock) == {"http://fixed:1", "http://c:1"}  # what failed stays out


def test_leases_run_out_and_half_written_ones_are_passed_over(tmp_path, monkeypatch):
    write_lease(tmp_path / "new", "http://a:7300", "d", 4)
    write_lease(tmp_path / "new", "http://b:7300", "d", 4)
    (tmp_path / "new" / "c.json").write_text('{"url": "http://c')
    (tmp_path / "new" / "d.json").write_text('{"url": "http://d:1"}')
    for name, wrong in {"e": {"url": "http://e:99999"}, "f": {"url": "file:///f"}, "g": {"expires_s": "never"}}.items():
        lease = {"url": f"http://{name}:1", "decoder_id": "d", "num_workers": 1, "expires_s": 1e12}
        (tmp_path / "new" / f"{name}.json").write_text(json.dumps(lease | wrong))
    assert [lease.url for lease in live_leases(tmp_path / "new")] == ["http://a:7300", "http://b:7300"]
    path = lease_path(tmp_path / "new", "http://a:7300")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expires_s": json.loads(path.read_text())["expires_s"] - LEASE_S - 1}))
    assert [lease.url for lease in live_leases(tmp_path / "new")] == ["http://b:7300"]
    assert live_leases(tmp_path / "none") == []


def test_leases_of_servers_that_are_long_dead_are_removed(tmp_path):
    others = {"settings.json": '{"url": "http://a:1"}', "half.json": '{"url"', "note.txt": "hello"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    for url, ago_s in {"http://a:1": -10.0, "http://b:1": DEAD_S - 60, "http://c:1": DEAD_S + 60}.items():
        write_lease(tmp_path, url, "d", 4)
        lease = json.loads(lease_path(tmp_path, url).read_text())
        lease_path(tmp_path, url).write_text(json.dumps(lease | {"expires_s": time.time() - ago_s}))
    remove_dead_leases(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "a-1.json", "b-1.json"}
    assert [lease.url for lease in live_leases(tmp_path)] == ["http://a:1"]


def test_a_registry_that_cannot_be_listed_for_a_moment_loses_no_server(tmp_path):
    (folder := tmp_path / "registry").mkdir()
    write_lease(folder, "http://a:1", "mine", 1)
    fleet = Fleet(("http://fixed:1",), folder, "mine", clock=(clock := Clock()))
    assert len(fleet.ranked(b"key")) == 2
    fleet._news._folder = tmp_path / ("x" * 300)  # no file system has such a name
    with pytest.raises(OSError, match="File name too long"):
        live_leases(fleet._news._folder)
    assert len(urls_after_a_while(fleet, clock)) == 2


def test_a_registry_that_hangs_costs_a_moment_at_the_beginning_and_fresh_news(tmp_path, monkeypatch):
    answers = threading.Event()
    monkeypatch.setattr("megatron_keye.io_server.registry.live_leases", lambda folder: [] if answers.wait(60) else None)
    monkeypatch.setattr("megatron_keye.io_server.registry.FIRST_READ_S", 0.2)
    fleet = Fleet(("http://fixed:1",), tmp_path, "mine", clock=(clock := Clock()))
    began_s = time.monotonic()
    for _ in range(5):
        clock.now_s += REREAD_S
        assert [server.url for server in fleet.ranked(b"key")] == ["http://fixed:1"]
    assert time.monotonic() - began_s < 2.0
    assert sum(thread.name == "registry" for thread in threading.enumerate()) == 1
    answers.set()
    write_lease(tmp_path, "http://a:1", "mine", 1)
    monkeypatch.undo()
    fleet._news._reader.join(10)
    assert urls_after_a_while(fleet, clock) == {"http://fixed:1", "http://a:1"}


@pytest.mark.parametrize("url", ["http://node1:7300", "http://[::1]:1", "http://10.0.0.1:65535"])
def test_urls_of_servers(url):
    assert is_server_url(url)
    assert not any(map(is_server_url, (f"{url}/", f"{url}00000", url[7:], url.replace("http", "https"), url.rpartition(":")[0])))


def test_a_slab_gives_its_bytes_back_and_cannot_be_changed_once_frozen():
    budget = SlabBudget(1000, limit_slabs=9)
    slab = budget.allocate(600)
    with pytest.raises(Refused, match="take 600 of 1000 bytes") as caught:
        budget.allocate(500)
    assert caught.value.code == "busy"
    with pytest.raises(Refused, match="--memory-mib") as caught:
        budget.allocate(1001)
    assert caught.value.code == "too_large"
    os.pwrite(slab.fd, b"x" * 600, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(slab.fd, 0)
    slab.freeze()
    with pytest.raises(PermissionError):
        os.pwrite(slab.fd, b"y", 0)
    fd = slab.fd
    del slab
    gc.collect()
    assert budget.used_bytes == 0
    with pytest.raises(OSError, match="Bad file"):
        fcntl.fcntl(fd, fcntl.F_GETFD)


async def made(slab):
    return "7"


def test_the_number_of_results_is_bounded_like_their_bytes():
    async def scenario():
        results = Results(budget := SlabBudget(1 << 30, limit_slabs=5))
        for number in range(20):
            await results.get(bytes([number]), 100, made, keep=True)
            assert budget.used_slabs <= 5
        await results.get(bytes([19]), 100, made, keep=True)
        assert results.hits == 1

    asyncio.run(scenario())


def test_the_least_recently_used_result_makes_room():
    async def scenario():
        results = Results(SlabBudget(300, limit_slabs=9))
        for key in (b"a", b"b", b"c"):
            await results.get(key, 100, made, keep=True)
        await results.get(b"a", 100, made, keep=True)
        await results.get(b"d", 100, made, keep=True)  # takes the place of b
        assert results.hits == 1
        await results.get(b"a", 100, made, keep=True)
        await results.get(b"b", 100, made, keep=True)
        assert results.hits == 2
        with pytest.raises(Refused, match="--memory-mib"):
            await results.get(b"e", 301, made, keep=True)
        assert results.kept_bytes == 300

    asyncio.run(scenario())


def test_one_that_leaves_does_not_take_the_result_from_the_others_and_the_last_ends_it():
    async def scenario():
        results, release, outcomes = Results(SlabBudget(300, limit_slabs=9)), asyncio.Event(), []

        async def slow(slab):
            try:
                await release.wait()
                return "7"
            except asyncio.CancelledError:
                outcomes.append("cancelled")
                raise

        first, second = (asyncio.create_task(results.get(b"a", 100, slow, keep=True)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        release.set()
        assert (await second).checksum == "7"
        assert outcomes == []
        release.clear()
        alone = asyncio.create_task(results.get(b"b", 100, slow, keep=True))
        await asyncio.sleep(0)
        alone.cancel()
        await asyncio.sleep(0)
        again = asyncio.create_task(results.get(b"b", 100, slow, keep=True))  # a new one, not the one that ends
        await asyncio.sleep(0)
        release.set()
        assert (await again).checksum == "7"
        assert outcomes == ["cancelled"]

    asyncio.run(scenario())


def test_a_failure_is_told_to_all_and_not_kept():
    async def scenario():
        results, calls = Results(SlabBudget(300, limit_slabs=9)), []

        async def failing(slab):
            calls.append(1)
            await asyncio.sleep(0)
            raise Refused("corrupt", "no")

        both = await asyncio.gather(*(results.get(b"a", 100, failing, keep=True) for _ in range(2)), return_exceptions=True)
        assert [error.code for error in both] == ["corrupt", "corrupt"]
        assert len(calls) == 1
        assert (await results.get(b"a", 100, made, keep=True)).checksum == "7"

    asyncio.run(scenario())


def test_histograms_are_in_the_text_format():
    metrics = Metrics()
    for seconds in (0.0005, 0.001, 0.2, 0.25, 1000.0):
        metrics.observe("decode_seconds", seconds, kind="video")
    metrics.observe("decode_seconds", 0.002, kind="image")
    first, *lines = metrics.text({}, {}).splitlines()
    assert first == "# TYPE keye_io_decode_seconds histogram"
    values = dict(line.rsplit(" ", 1) for line in lines)
    of_videos = {
        '_bucket{kind="video",le="0.001"}': "2", '_bucket{kind="video",le="0.1"}': "2", '_bucket{kind="video",le="0.3"}': "4",
        '_bucket{kind="video",le="100.0"}': "4", '_bucket{kind="video",le="+Inf"}': "5", '_sum{kind="video"}': "1000.4515",
        '_count{kind="video"}': "5", '_count{kind="image"}': "1",
    }  # fmt: skip
    assert {name: values[f"keye_io_decode_seconds{name}"] for name in of_videos} == of_videos


def test_metrics_are_in_the_text_format():
    metrics = Metrics()
    metrics.add("responses_total", status="200")
    metrics.add("responses_total", 2, status="503")
    metrics.add("sent_bytes_total", 123456789012)
    assert metrics.text({"cache_hits_total": 4}, {"workers": 3}).splitlines() == [
        "# TYPE keye_io_cache_hits_total counter",
        "keye_io_cache_hits_total 4",
        "# TYPE keye_io_responses_total counter",
        'keye_io_responses_total{status="200"} 1',
        'keye_io_responses_total{status="503"} 2',
        "# TYPE keye_io_sent_bytes_total counter",
        "keye_io_sent_bytes_total 123456789012",
        "# TYPE keye_io_workers gauge",
        "keye_io_workers 3",
    ]


@pytest.mark.parametrize(("text", "mode", "problem"), [("a secret that is long", 0o644, "chmod 600"), ("short", 0o600, "holds 5 bytes")])
def test_a_secret_file_must_be_private_and_long(tmp_path, text, mode, problem):
    (path := tmp_path / "secret").write_text(text)
    path.chmod(mode)
    with pytest.raises(SettingsError, match=problem):
        load_secret(path)
    path.write_text(" a secret that is long\n")
    path.chmod(0o600)
    assert load_secret(path) == b"a secret that is long"


def test_the_front_needs_no_torch():
    code = "import sys, megatron_keye.train.commands.io_server; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
