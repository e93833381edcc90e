"""The server: what it answers, and what may go wrong without costing more than the request at hand."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from megatron_keye.errors import SettingsError
from megatron_keye.io_server import auth
from megatron_keye.io_server.front import WORKER_EVENTS
from megatron_keye.io_server.protocol import DECODE_PATH, RESULT_HEADER
from megatron_keye.io_server.registry import lease_path, write_lease
from tests.unit.io_server.serving import MIB, RunningServer, clip_job, error_of, expected, is_well, job_for, post, request, wait_until

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """A server that gives a decode one second, and its root."""
    root = tmp_path_factory.mktemp("impatient")
    server = RunningServer(root, decode_s=1.0)
    yield server, root
    server.close()


def test_an_answer_is_the_patches_and_a_header_that_describes_them(plain):
    server, root = plain
    (path := root / "a").write_bytes(b"some picture")
    job = clip_job(path, 3)
    status, headers, body = post(server.url, job)
    assert status == 200
    assert body == expected(job, path)
    facts = json.loads(headers[RESULT_HEADER])
    assert facts["segments"] == [4] * 3
    assert facts["decoder_id"] == job.decoder_id


def test_a_span_of_a_file_is_read(plain):
    server, root = plain
    (whole := root / "shard").write_bytes(b"before" + b"medium" + b"after")
    (alone := root / "alone").write_bytes(b"medium")
    job = job_for(alone, path=str(whole), offset=6)
    assert post(server.url, job)[2] == expected(job, alone)


def test_one_connection_takes_request_after_request(plain):
    server, root = plain
    (path := root / "b").write_bytes(b"again")
    job = job_for(path)
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    for _ in range(3):
        connection.request("POST", DECODE_PATH, job.model_dump_json())
        assert connection.getresponse().read() == expected(job, path)
    first_socket = connection.sock
    assert first_socket is not None
    connection.close()


def test_health_and_metrics_tell_what_happened(plain):
    server, root = plain
    (path := root / "f").write_bytes(b"counted")
    assert is_well(server, path)
    status, _, body = request(server.url, b"", method="GET", path="/healthz")
    facts = json.loads(body)
    assert (status, facts["status"], facts["workers"]) == (200, "ok", 1)
    lines = request(server.url, b"", method="GET", path="/metrics")[2].decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['keye_io_decoded_total{kind="image"}']) >= 1
    assert float(values["keye_io_memory_used_bytes"]) >= 4 * 588
    assert float(values["keye_io_worker_jobs_total"]) >= 1
    assert values["keye_io_worker_crashed_total"] == "0"
    assert set(server.pool.counts) <= set(WORKER_EVENTS)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        ("crash", 422, "worker_crashed"),
        ("killed", 503, "worker_lost"),
        ("memory", 422, "oom"),
        ("hang", 504, "decode_timeout"),
        ("corrupt", 422, "corrupt"),
        ("bug", 500, "internal"),
        ("short", 422, "corrupt"),
    ],
)
def test_what_goes_wrong_costs_one_request(impatient, content, status, code):
    server, root = impatient
    (bad := root / content).write_bytes(content.encode())
    (good := root / "good").write_bytes(f"not {content}".encode())
    assert error_of(post(server.url, job_for(bad))) == (status, code)
    assert is_well(server, good)
    assert server.pool.num_ready == 1


def test_a_worker_that_dies_once_is_replaced_within_the_request(start_server, write, tmp_path):
    server = start_server(num_workers=2)
    path = write(f"crash_once {tmp_path / 'marker'}", name="once")
    job = clip_job(path, 4, side=112)  # larger than a file's buffer
    assert post(server.url, job)[2] == expected(job, path)
    wait_until(lambda: server.pool.num_ready == 2)


def test_a_worker_killed_in_a_request_is_replaced_within_it(start_server, write):
    server = start_server(num_workers=1)
    slow = write("sleep 0.1")
    job = clip_job(slow, 4)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, server.url, job)
        wait_until(lambda: server.pool.running)
        os.kill(server.pool.pids[0], signal.SIGKILL)
        assert answer.result()[2] == expected(job, slow)


def test_workers_killed_while_idle_cost_no_request(start_server, write):
    server = start_server(num_workers=2)
    for pid in server.pool.pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(worker.process.returncode is not None for worker in server.pool._workers))
    assert is_well(server, write("good"))


def test_a_full_queue_says_when_to_come_back_and_nothing_is_lost(start_server, write):
    server = start_server(num_workers=1, queue_jobs=2)
    paths = [write(f"sleep 0.3 {number}") for number in range(6)]
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda path: post(server.url, job_for(path)), paths))
    busy = [answer for answer in answers if answer[0] == 503]
    assert len(busy) == 3
    assert all(error_of(answer)[1] == "busy" and answer[1]["retry-after"] == "1" for answer in busy)
    assert sum(answer[0] == 200 for answer in answers) == 3
    assert is_well(server, paths[0])


def test_results_take_no_more_memory_than_allowed(start_server, write):
    num_bytes = job_for(write("x")).result_bytes
    server = start_server(num_workers=2, memory_bytes=2 * num_bytes)
    for number in range(5):
        assert is_well(server, write(f"kept {number}"))
        assert server.front._budget.used_bytes <= 2 * num_bytes
    slow = [write(f"sleep 0.4 {number}") for number in range(2)]
    with ThreadPoolExecutor(2) as threads:
        answers = threads.map(lambda path: post(server.url, job_for(path))[0], slow)
        wait_until(lambda: server.pool.running == 2)
        assert error_of(post(server.url, job_for(write("third")))) == (503, "busy")
        assert list(answers) == [200, 200]


def test_equal_jobs_are_decoded_once_and_kept(start_server, write):
    server = start_server(num_workers=2)
    path = write("sleep 0.3")
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: post(server.url, job_for(path)), range(4)))
    assert {answer[2] for answer in answers} == {expected(job_for(path), path)}
    assert is_well(server, path)
    assert server.pool.counts["jobs"] == 1


def test_time_in_the_queue_is_told_from_time_of_decoding_and_what_is_kept_counts_for_neither(start_server, write):
    server = start_server(num_workers=1)
    paths = [write(f"sleep 0.3 {number}") for number in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda path: post(server.url, job_for(path)), paths))
    assert is_well(server, paths[0])
    lines = request(server.url, b"", method="GET", path="/metrics")[2].decode().splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
    assert values['keye_io_decode_seconds_count{kind="image"}'] == values['keye_io_queue_seconds_count{kind="image"}'] == 2
    assert 0.6 <= values['keye_io_decode_seconds_sum{kind="image"}'] < 1.2
    assert 0.2 <= values['keye_io_queue_seconds_sum{kind="image"}'] < 0.6
    assert values['keye_io_decoded_total{kind="image"}'] == 3


def test_what_has_no_checksum_is_not_kept(start_server, write):
    server = start_server()
    path = write("before")
    job = job_for(path, sha256=None)
    assert post(server.url, job)[2] == expected(job, path)
    path.write_bytes(b"after!")
    assert post(server.url, job)[2] == expected(job, path)


def test_a_client_that_vanishes_frees_the_worker(start_server, write):
    server = start_server(num_workers=1, decode_s=30.0)
    slow = write("sleep 0.1")
    body = clip_job(slow, 200).model_dump_json()
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port)
    connection.request("POST", DECODE_PATH, body)
    wait_until(lambda: server.pool.running)
    connection.close()
    wait_until(lambda: not server.pool.running, timeout_s=3.0)
    assert server.pool.counts["cancelled"] == 1
    assert is_well(server, write("good"))
    assert server.pool.counts["started"] == 1


def test_a_reader_that_stops_is_cut_off(start_server, write, monkeypatch):
    monkeypatch.setattr("megatron_keye.io_server.connection.PIECE_S", 0.5)
    server = start_server()
    job = job_for(write("big"), sizes=((28 * 120, 28 * 120),))
    assert job.result_bytes > 30 * MIB
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        body = job.model_dump_json().encode()
        sock.sendall(b"POST /v1/decode HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert sock.recv(1) == b"H"
        wait_until(lambda: not server.front._connections, timeout_s=5.0)


def test_a_mistake_costs_one_request_and_all_that_is_said_of_it_is_json(start_server, write, monkeypatch, capfd):
    server = start_server()
    path = write("good")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_keye.io_server.front.parse_job", lambda text: 1 // 0)
        assert error_of(post(server.url, job_for(path))) == (500, "internal")
    assert is_well(server, path)
    assert error_of(post(server.url, job_for(write("bug")))) == (500, "internal")
    assert error_of(post(server.url, job_for(write("warn")))) == (500, "internal")
    logged = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert all(line["time"] and line["event"] for line in logged)
    tracebacks = [line["traceback"] for line in logged if line["event"] == "internal error"]
    assert [text.splitlines()[-1].partition(":")[0] for text in tracebacks] == ["ZeroDivisionError", "RuntimeError", "RuntimeError"]
    (warning,) = [line["message"] for line in logged if line["event"] == "warning"]
    assert "UserWarning: strange" in warning


def test_a_server_on_all_addresses_announces_the_name_of_its_machine(start_server):
    assert start_server(host="0.0.0.0", secret=SECRET).url.startswith(f"http://{socket.gethostname()}:")


@pytest.mark.parametrize("case", ["none", "other secret", "other body", "expired", "from the future", "nonsense"])
def test_a_token_must_be_right(start_server, write, case):
    server = start_server(secret=SECRET)
    body = job_for(write("good")).model_dump_json().encode()
    now_s = time.time()
    header = {
        "none": None,
        "other secret": auth.sign(b"another secret, as long", DECODE_PATH, body, now_s),
        "other body": auth.sign(SECRET, DECODE_PATH, body + b" ", now_s),
        "expired": auth.sign(SECRET, DECODE_PATH, body, now_s - 2 * auth.WINDOW_S),
        "from the future": auth.sign(SECRET, DECODE_PATH, body, now_s + 2 * auth.WINDOW_S),
        "nonsense": "Keye-HMAC-SHA256 \xb2 \xe4",
    }[case]
    headers = {} if header is None else {"Authorization": header}
    assert error_of(request(server.url, body, headers)) == (403, "denied")
    assert request(server.url, body, {"Authorization": auth.sign(SECRET, DECODE_PATH, body, now_s)})[0] == 200


def test_a_server_without_a_secret_stays_on_this_machine(tmp_path):
    with pytest.raises(SettingsError, match="without --secret-file"):
        RunningServer(tmp_path, host="0.0.0.0")


def test_a_request_to_stop_finishes_what_is_at_hand(start_server, write, tmp_path):
    write_lease(tmp_path / "registry", "http://dead:1", "d", 4)
    dead = lease_path(tmp_path / "registry", "http://dead:1")
    dead.write_text(json.dumps(json.loads(dead.read_text()) | {"expires_s": 1e9}))
    server = start_server(num_workers=1, registry=tmp_path / "registry")
    wait_until(lambda: not dead.exists())
    slow = write("sleep 0.2")
    job = clip_job(slow, 4)
    wait_until(lambda: list((tmp_path / "registry").glob("*.json")))
    address = urlsplit(server.url)
    kept_open = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    kept_open.request("GET", "/healthz")
    kept_open.getresponse().read()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, server.url, job)
        wait_until(lambda: server.pool.running)
        server.ask_to_stop()
        wait_until(server.front._draining.is_set)
        kept_open.request("POST", DECODE_PATH, job_for(slow).model_dump_json())
        response = kept_open.getresponse()
        assert (response.status, json.loads(response.read())["error"]) == (503, "draining")
        assert answer.result()[2] == expected(job, slow)
    kept_open.close()
    server.close()
    assert not list((tmp_path / "registry").glob("*.json"))
    assert not any(thread.name.startswith("asyncio") and not thread.daemon for thread in threading.enumerate())
