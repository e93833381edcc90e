"""Media at web addresses: in the shards they are as files are, and what cannot be had is a problem of its record."""

import json
from ipaddress import ip_network

import pytest

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.record import parse_record
from megatron_keye.data.shards import iter_samples, list_shards, read_span
from megatron_keye.data.web_media import shown, web_bytes, web_num_bytes
from megatron_keye.data.writing import plan_shards, write_shards
from megatron_keye.errors import DataError, MediumUnreachableError
from tests.unit.data.corpus import png
from tests.unit.data.http_server import serving

QUICK = StorageConfig(attempts=3, first_pause_s=0.01, private_networks=("127.0.0.0/8",))


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
    plan = plan_shards(source, 10_000, QUICK)
    assert [problem.reason.partition(": ")[2] for problem in plan.problems] == [
        f"{url}/gone.png: found HTTP status 404 Not Found; correct the address, or remove the record"
    ]
    assert plan.problems[0].reason.startswith(f"{source}:2, record 1: ")
    assert {method for method, *_ in faults.requests} == {"HEAD"}
    write_shards(source, tmp_path / "out", plan, storage=QUICK)
    (shard,) = list_shards(tmp_path / "out")
    ((_, members),) = iter_samples(shard)
    assert read_span(shard, members["0.png"]) == png(40, 60, 1)
    stored = parse_record(json.loads(read_span(shard, members["json"])), "x")
    assert [(m.origin, m.address) for m in stored.media] == [("member", "0.png")]


def test_failures_that_pass_are_waited_for(web):
    url, faults = web
    faults.fail_first = 2
    assert web_bytes(f"{url}/a.png", "r1", QUICK) == png(40, 60, 1)
    faults.fail_first = 2
    assert web_num_bytes(f"{url}/a.png", "r1", QUICK) == len(png(40, 60, 1))


def test_failures_that_last_name_the_record_and_the_address(web):
    url, faults = web
    faults.fail_first = 3
    with pytest.raises(MediumUnreachableError, match=f"r1: {url}/a.png: no whole answer in 3 tries, the last: HTTP status 503"):
        web_bytes(f"{url}/a.png", "r1", QUICK)


def test_a_body_that_breaks_off_is_never_taken_for_whole(web):
    url, faults = web
    faults.truncate = True
    with pytest.raises(MediumUnreachableError, match="no whole answer in 3 tries, the last: ClientPayloadError"):
        web_bytes(f"{url}/a.png", "r1", QUICK)
    assert len(faults.requests) == 3


def test_what_is_missing_empty_or_too_large_is_asked_for_once(web):
    url, faults = web
    for name, settings, problem in (
        ("gone.png", QUICK, "found HTTP status 404 Not Found"),
        ("empty.png", QUICK, "is empty"),
        ("a.png", QUICK.model_copy(update={"medium_bytes": 100}), r"has more than 100 bytes \(data.storage.medium_bytes\)"),
    ):
        with pytest.raises(DataError, match=f"r1: {url}/{name}:? {problem}") as caught:
            web_bytes(f"{url}/{name}", "r1", settings)
        assert caught.value.exit_code == 65
    assert len(faults.requests) == 3


@pytest.mark.parametrize("changes", [{"stall_s": 1.0}, {"latency_s": 1.0}, {"fail_first": 1000}])
def test_one_time_limit_holds_for_all_tries_together(web, changes):
    url, faults = web
    for name, value in changes.items():
        setattr(faults, name, value)
    patient = QUICK.model_copy(update={"attempts": 1000, "medium_timeout_s": 0.3})
    with pytest.raises(MediumUnreachableError, match="a.png took more than 0.3 s") as caught:
        web_bytes(f"{url}/a.png", "r1", patient)
    assert caught.value.exit_code == 1


def test_a_server_that_pauses_for_too_long_is_asked_again(web):
    url, faults = web
    faults.stall_s = 0.5
    with pytest.raises(MediumUnreachableError, match="no whole answer in 3 tries, the last: .*imeout"):
        web_bytes(f"{url}/a.png", "r1", QUICK.model_copy(update={"timeout_s": 0.1}))
    assert len(faults.requests) == 3


def test_a_server_that_tells_no_sizes_is_not_an_error(web):
    url, faults = web
    faults.fail_first, faults.status = 1, 405
    assert web_num_bytes(f"{url}/a.png", "r1", QUICK) == 0


def test_redirects_are_followed_to_an_end_and_only_over_http(web):
    url, faults = web
    faults.redirects |= {"/moved.png": "/a.png", "/ring.png": "/ring.png", "/file.png": "file:///etc/passwd", "/ftp.png": "ftp://h/a.png"}
    assert web_bytes(f"{url}/moved.png", "r1", QUICK) == png(40, 60, 1)
    with pytest.raises(DataError, match="leads on more than 5 times"):
        web_bytes(f"{url}/ring.png", "r1", QUICK)
    for name in ("file.png", "ftp.png"):
        faults.requests.clear()
        with pytest.raises(DataError, match=r"r1: .*expected one of http or https"):
            web_bytes(f"{url}/{name}", "r1", QUICK)
        assert len(faults.requests) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
def test_nothing_inside_is_asked_unless_the_settings_name_its_network(web, host):
    url, faults = web
    address = f"{url.replace('127.0.0.1', host)}/a.png"
    with pytest.raises(DataError, match=r"r1: .*a.png lies at 127.0.0.1, which is not public; .*data.storage.private_networks"):
        web_bytes(address, "r1", QUICK.model_copy(update={"private_networks": ()}))
    assert not faults.requests
    if "::" not in host:  # the server itself listens on IPv4 alone
        assert web_bytes(address, "r1", QUICK)


def test_a_redirect_does_not_lead_inside(web):
    url, faults = web
    port = url.rpartition(":")[2]
    faults.redirects["/out.png"] = f"http://127.0.0.2:{port}/a.png"
    only = QUICK.model_copy(update={"private_networks": (ip_network("127.0.0.1/32"),)})
    with pytest.raises(DataError, match="lies at 127.0.0.2, which is not public"):
        web_bytes(f"{url}/out.png", "r1", only)


@pytest.mark.parametrize("url", ["http://", "http://[", "http://127.0.0.1:9/a.png", "http://no-such-host.invalid/a.png"])
def test_what_is_no_address_or_nobodys_is_named(url):
    with pytest.raises(DataError, match="r1: "):
        web_bytes(url, "r1", QUICK)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:word@host:8443/a/b.jpg?sig=secret#top", "https://host:8443/a/b.jpg"),
        ("http://host?token=secret", "http://host"),
        ("https://host/a@b.jpg", "https://host/a@b.jpg"),
    ],
)
def test_messages_leave_out_what_would_let_their_readers_in(url, expected):
    assert shown(url) == expected
