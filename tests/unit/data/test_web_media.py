"""Media at web addresses: in the shards they are as files are, and what cannot be had is a problem of its record."""

import json

import pytest

from megatron_keye.data.record import parse_record
from megatron_keye.data.retry import Retries
from megatron_keye.data.shards import iter_samples, list_shards, read_span
from megatron_keye.data.web_media import web_bytes, web_num_bytes
from megatron_keye.data.writing import plan_shards, write_shards
from megatron_keye.errors import DataError
from tests.unit.data.corpus import png
from tests.unit.data.http_server import serving

QUICK = Retries(attempts=3, first_pause_s=0.01)


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.png").write_bytes(png(40, 60, 1))
    (tmp_path / "web" / "empty.png").write_bytes(b"")
    with serving(tmp_path / "web") as (url, faults):
        yield url, faults


def test_shards_hold_the_bytes_of_web_addresses(web, tmp_path):
    url, faults = web
    lines = [{"id": n, "document": [{"type": "image", "image": f"{url}/{name}"}]} for n, name in enumerate(("a.png", "gone.png"))]
    (source := tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = plan_shards(source, shard_bytes=10_000)
    assert [problem.reason.partition(": ")[2] for problem in plan.problems] == [
        f"{url}/gone.png: found HTTP status 404 Not Found; correct the address, or remove the record"
    ]
    assert plan.problems[0].reason.startswith(f"{source}:2, record 1: ")
    assert {method for method, *_ in faults.requests} == {"HEAD"}
    write_shards(source, tmp_path / "out", plan)
    (shard,) = list_shards(tmp_path / "out")
    ((_, members),) = iter_samples(shard)
    assert read_span(shard, members["0.png"]) == png(40, 60, 1)
    stored = parse_record(json.loads(read_span(shard, members["json"])), "x")
    assert [(m.origin, m.address) for m in stored.media] == [("member", "0.png")]


def test_failures_that_pass_are_waited_for(web):
    url, faults = web
    faults.fail_first = 2
    assert web_bytes(f"{url}/a.png", "r1", retries=QUICK) == png(40, 60, 1)
    faults.fail_first = 2
    assert web_num_bytes(f"{url}/a.png", "r1", retries=QUICK) == len(png(40, 60, 1))


def test_failures_that_last_name_the_record_and_the_address(web):
    url, faults = web
    faults.fail_first = 3
    with pytest.raises(DataError, match=f"r1: {url}/a.png: no whole answer in 3 tries, the last: HTTP status 503"):
        web_bytes(f"{url}/a.png", "r1", retries=QUICK)


def test_a_body_that_breaks_off_is_never_taken_for_whole(web):
    url, faults = web
    faults.truncate = True
    with pytest.raises(DataError, match=r"no whole answer in 3 tries, the last: found \d+ of \d+ bytes"):
        web_bytes(f"{url}/a.png", "r1", retries=QUICK)
    assert len(faults.requests) == 3


def test_limits_of_size_and_time_hold(web):
    url, faults = web
    with pytest.raises(DataError, match="r1: .*/a.png has more than 100 bytes"):
        web_bytes(f"{url}/a.png", "r1", max_bytes=100, retries=QUICK)
    with pytest.raises(DataError, match="took more than 0 s"):
        web_bytes(f"{url}/a.png", "r1", timeout_s=0.0, retries=QUICK)
    with pytest.raises(DataError, match="is empty"):
        web_bytes(f"{url}/empty.png", "r1", retries=QUICK)
    assert len(faults.requests) == 3


def test_a_server_that_tells_no_sizes_is_not_an_error(web):
    url, faults = web
    faults.fail_first, faults.status = 1, 405
    assert web_num_bytes(f"{url}/a.png", "r1", retries=QUICK) == 0


@pytest.mark.parametrize("url", ["http://", "http://[", "http://127.0.0.1:9/a.png"])
def test_what_is_no_address_or_nobodys_is_named(url):
    with pytest.raises(DataError, match="r1: "):
        web_bytes(url, "r1", retries=QUICK)
