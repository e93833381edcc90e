"""The client: whatever happens to servers, the bytes are right or the caller is told to decode by itself."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.slow_path import SlowPath
from megatron_keye.io_server.attempts import Attempt, AttemptFailed, Connections, Timeouts
from megatron_keye.io_server.buffers import BufferPool
from megatron_keye.io_server.client import ByteCredits, Poisonous
from megatron_keye.io_server.server_times import ServerTimes
from tests.unit.io_server.serving import CLIENT, MIB, RunningServer, as_bytes, client_of, clip_job, expected, job_for, post, wait_until


def first_choice(client, job):
    return client.fleet.ranked(job.key)[0].url


def in_order(job, servers):
    """Servers from first to last choice for `job`."""
    urls = [server.url for server in client_of(*(server.url for server in servers)).fleet.ranked(job.key)]
    return sorted(servers, key=lambda server: urls.index(server.url))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two servers that last, for tests that leave them as they were."""
    servers = [RunningServer(tmp_path_factory.getbasetemp(), num_workers=1, queue_jobs=32) for _ in range(2)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def listener():
    """A socket that accepts connections in its backlog and never answers; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_results_are_the_servers_bytes_whatever_their_number_at_a_time(pair, write):
    client = client_of(*(server.url for server in pair), requests=8)
    paths = [write(f"picture {number}") for number in range(24)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda path: client.fetch(clip_job(path, 1 + len(path.name) % 3)), paths))
    for path, answer in zip(paths, answers, strict=True):
        assert as_bytes(answer) == expected(clip_job(path, 1 + len(path.name) % 3), path)
    assert client.counts.values == {"remote": 24}


def test_without_any_server_the_caller_decodes(write):
    client = client_of("http://127.0.0.1:9", "http://127.0.0.1:10")
    began_s = time.monotonic()
    for number in range(5):
        assert client.fetch(job_for(write(f"picture {number}"))) is None
    assert time.monotonic() - began_s < 2.0
    assert client.counts.values["failed"] <= 6  # then they are left alone
    assert "Connection refused" in client.counts.last_failure


def test_a_server_that_is_gone_is_made_up_for_by_another(start_server, write):
    path = write("picture")
    job = job_for(path)
    first, second = in_order(job, [start_server(), start_server()])
    client = client_of(first.url, second.url)
    assert as_bytes(client.fetch(job)) == expected(job, path)
    first.close()
    assert as_bytes(client.fetch(job)) == expected(job, path)
    assert client.counts.values == {"remote": 2, "failed": 1, "retried": 1}


def test_a_restarted_server_is_used_again_by_a_client_that_kept_its_connections(start_server, write):
    path = write("picture")
    job = job_for(path)
    server = start_server()
    client = client_of(server.url)
    assert as_bytes(client.fetch(job)) == expected(job, path)
    port = int(server.url.rpartition(":")[2])
    server.close()
    start_server(port=port)
    assert as_bytes(client.fetch(job)) == expected(job, path)
    assert client.counts.values == {"remote": 2}


def test_a_busy_server_is_waited_for(start_server, write):
    server = start_server(num_workers=1, queue_jobs=1)
    client = client_of(server.url, requests=4)
    paths = [write(f"sleep 0.1 {number}") for number in range(6)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda path: client.fetch(job_for(path)), paths))
    assert [as_bytes(a) for a in answers] == [expected(job_for(path), path) for path in paths]
    assert client.counts.values["remote"] == 6
    assert client.counts.values["busy"] > 0


def test_a_place_at_a_busy_server_is_taken_as_soon_as_it_is_free(start_server, write):
    """Not only after `Retry-After`, of one second."""
    client = client_of(start_server(num_workers=1, queue_jobs=1).url, requests=8)
    paths = [write(f"sleep 0.02 {number}") for number in range(30)]
    began_s = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda path: client.fetch(job_for(path)), paths))
    assert time.monotonic() - began_s < 4.0
    assert [as_bytes(a) for a in answers] == [expected(job_for(path), path) for path in paths]
    assert client.counts.values["busy"] > 0


def test_a_slow_server_is_hedged_and_the_loser_stops(pair, write):
    path = write("sleep 0.05")
    job = clip_job(path, 20)
    first, second = in_order(job, pair)
    post(second.url, job)  # which now has the answer, as if it were the faster machine
    client = client_of(first.url, second.url, hedge_after_s=0.2)
    answer = client.fetch(job)
    assert as_bytes(answer) == expected(job, path)
    assert client.counts.values == {"remote": 1, "hedged": 1, "hedge_won": 1}
    wait_until(lambda: first.pool.counts["cancelled"] == 1 and not first.pool.running)


def test_a_cancelled_attempt_ends_its_own_connection_and_no_other(start_server, write):
    server = start_server(num_workers=2)
    connections = Connections(CLIENT.timeouts, None, BufferPool(MIB))
    slow, quick = (Attempt(connections, server.url, job, time.monotonic() + 20) for job in
                   (clip_job(write("sleep 0.1"), 100), job_for(write("quick"))))  # fmt: skip
    for connection in [slow._connect() for _ in range(3)]:
        connections.give_back(server.url, connection)
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(slow.run)
        wait_until(lambda: server.pool.running)
        slow.cancel()
        with pytest.raises(AttemptFailed):
            ending.result(5)
    quick.run()
    quick.cancel()  # too late: its connection may be in use again
    assert len(connections._idle[server.url]) == 2
    quick = Attempt(connections, server.url, job_for(write("quick")), time.monotonic() + 20)
    assert as_bytes(quick.run()) == expected(job_for(write("quick")), write("quick"))


def test_a_name_that_none_can_be_is_a_failure_of_the_server(write):
    client = client_of("http://node..1:7300")
    assert client.fetch(job_for(write("picture"))) is None
    assert "UnicodeError" in client.counts.last_failure


def test_a_server_that_hangs_is_hedged_then_left_alone(pair, listener, write):
    client = client_of(listener, pair[0].url, hedge_after_s=0.1)
    client.times._allowance = 10.0
    paths = [path for path in (write(f"picture {n}") for n in range(50)) if first_choice(client, job_for(path)) == listener]
    assert len(paths) > 10
    began_s = time.monotonic()
    for path in paths:
        assert as_bytes(client.fetch(job_for(path))) == expected(job_for(path), path)
    assert time.monotonic() - began_s < 5.0
    assert client.counts.values["hedge_won"] == 3


def test_a_hanging_server_alone_costs_the_deadline_until_it_is_left_alone(listener, write):
    client = client_of(listener, deadline_s=0.3)
    job = job_for(write("picture"))
    for _ in range(3):
        assert client.fetch(job) is None
    began_s = time.monotonic()
    assert client.fetch(job) is None
    assert time.monotonic() - began_s < 0.2


def test_a_server_with_another_decoder_is_not_used(start_server, write, monkeypatch):
    server = start_server()
    client = client_of(server.url)
    job = job_for(write("picture"), decoder_id="mine")
    assert client.fetch(job) is None
    assert "wrong_decoder" in client.counts.last_failure
    # Nor one that does not look at what it was asked.
    server.front._decoder_id = "mine"
    assert client_of(server.url).fetch(job) is not None
    monkeypatch.setattr("megatron_keye.io_server.front.json.dumps", lambda facts: '{"decoder_id": "x", "segments": [4], "xxh3_64": "0"}')
    liar = client_of(server.url)
    assert liar.fetch(job) is None
    assert "decoded with x, expected mine" in liar.counts.last_failure


ANSWERS = {
    "one that ends early": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2352\r\nx-keye-result: {facts}\r\n\r\n" + b"x" * 1000,
        "ended after 1000 of 2352",
    ),
    "one of another size": (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nx-keye-result: {facts}\r\n\r\n" + b"x" * 10, "other sizes"),
    "one without a header": (b"HTTP/1.1 200 OK\r\nContent-Length: 2352\r\n\r\n" + b"x" * 2352, "no I/O server"),
    "an error page": (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>", "status 502 without an explanation"),
    "no HTTP": (b"220 smtp.example.com ESMTP\r\n", "BadStatusLine"),
    "nothing": (b"", "RemoteDisconnected"),
}


def read_request(connection: socket.socket) -> bytes:
    """A whole request: its JSON ends with a brace, and nothing before it does."""
    received = b""
    while not received.endswith(b"}"):
        received += connection.recv(1 << 16)
    return received


@pytest.mark.parametrize(("answer", "problem"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_cannot_be_believed_is_a_failure_of_the_server(write, answer, problem):
    job = job_for(write("picture"))
    facts = json.dumps({"decoder_id": job.decoder_id, "segments": job.segments, "xxh3_64": "0"}).encode()
    with socket.create_server(("127.0.0.1", 0)) as sock, ThreadPoolExecutor(1) as threads:

        def serve_once():
            connection, _ = sock.accept()
            with connection:
                read_request(connection)
                connection.sendall(answer.replace(b"{facts}", facts))

        serving = threads.submit(serve_once)
        client = client_of(f"http://127.0.0.1:{sock.getsockname()[1]}")
        assert client.fetch(job) is None
        serving.result()
    assert problem in client.counts.last_failure


def test_an_answer_that_stops_coming_is_given_up(write):
    job = job_for(write("picture"))
    facts = json.dumps({"decoder_id": job.decoder_id, "segments": job.segments, "xxh3_64": "0"}).encode()
    with socket.create_server(("127.0.0.1", 0)) as sock, ThreadPoolExecutor(1) as threads:

        def serve_half():
            connection, _ = sock.accept()
            with connection:
                received = read_request(connection)
                connection.sendall(ANSWERS["one that ends early"][0].replace(b"{facts}", facts))
                while part := connection.recv(1 << 16):
                    received += part
                return received

        serving = threads.submit(serve_half)
        client = client_of(f"http://127.0.0.1:{sock.getsockname()[1]}", timeouts=Timeouts(connect_s=1.0, stall_s=0.3))
        began_s = time.monotonic()
        assert client.fetch(job) is None
        assert time.monotonic() - began_s < 3.0
        assert serving.result().startswith(b"POST /v1/decode")
    assert "TimeoutError" in client.counts.last_failure


def test_changed_pixels_are_noticed(pair, write, monkeypatch):
    job = job_for(write("picture"))
    monkeypatch.setattr("megatron_keye.io_server.attempts.xxhash.xxh3_64_hexdigest", lambda data: "1")
    client = client_of(pair[0].url)
    assert client.fetch(job) is None
    assert "checksum" in client.counts.last_failure


def test_a_damaged_medium_is_asked_for_once(pair, write):
    job = job_for(write("corrupt"))
    client = client_of(*(server.url for server in pair))
    assert client.fetch(job) is None
    assert client.counts.values == {"failed": 1, "confirmed_here": 1}


def test_a_server_that_may_not_read_one_set_is_asked_for_others_and_the_log_says_so_once(start_server, write, tmp_path, caplog):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    server = start_server(root=tmp_path / "in")
    client = client_of(server.url)
    for number in range(4):
        assert client.fetch(job_for(write("picture", f"out/{number}"))) is None
        assert client.fetch(job_for(write("picture", f"in/{number}"))) is not None
    assert client.counts.values == {"remote": 4, "failed": 4}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("a server may not read") and f"{server.url}: forbidden_path" in said


def test_a_server_that_is_tried_again_is_in_order_whatever_it_answers(pair, write):
    client = client_of(pair[0].url)
    (server,) = client.fleet.ranked(b"key")
    server.trip("of this test")
    server.breaker.open_until_s = time.monotonic()
    assert client.fetch(job_for(write("corrupt"))) is None
    assert client.fetch(job_for(write("picture"))) is not None


def test_a_medium_that_kills_decoders_is_kept_from_the_caller(pair, write):
    job = job_for(write("crash"))
    with pytest.raises(Poisonous, match="2 servers"):
        client_of(*(server.url for server in pair)).fetch(job)
    # One server's word is not enough.
    assert client_of(pair[0].url).fetch(job) is None


def test_byte_credits_bound_what_is_on_its_way_and_let_one_large_result_through():
    credits = ByteCredits(100)
    held, most = 0, 0
    lock = threading.Lock()

    def work(num_bytes):
        nonlocal held, most
        with credits.hold(num_bytes):
            with lock:
                held += num_bytes
                most = max(most, held)
                assert held <= 100 or held == num_bytes
            time.sleep(0.01)
            with lock:
                held -= num_bytes

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, [40, 60, 30, 250, 10, 90, 50, 50, 70, 20]))
    assert held == 0
    assert most == 250


def test_hedging_waits_for_what_is_usual_and_stays_within_its_share(write):
    job = job_for(write("picture"))
    times = ServerTimes(0.5)
    assert times.hedge_after_s(job) == 0.5
    for _ in range(20):
        times.answered("a", job, 4.0)
    assert times.hedge_after_s(job) == pytest.approx(4.0)
    larger = job_for(write("picture"), sizes=((56, 28),))
    assert times.hedge_after_s(larger) == pytest.approx(8.0)
    assert sum(times.may_hedge() for _ in range(20)) == 3  # 1 to begin with, and a tenth of 20


def test_a_server_is_slow_where_it_is_late_and_another_is_several_times_as_fast(write):
    job, clip, times = job_for(write("picture")), clip_job(write("clip"), 2), ServerTimes(0.5)
    for _ in range(8):
        times.answered("fast", job, 0.1)
        times.answered("fast", clip, 5.0)
        times.answered("near", job, 0.29)
        times.answered("slow", job, 0.31)
    assert [times.is_slow(url, job, 1.0) for url in ("fast", "near", "slow", "new")] == [False, False, True, False]
    assert not times.is_slow("slow", job, 0.4), "within what nobody minds"
    assert not times.is_slow("slow", clip, 9.0), "of clips nothing is known of it"
    for _ in range(4):
        times.answered("slow", job, 0.1)
    assert not times.is_slow("slow", job, 1.0), "half of its last ones were as fast"
    for _ in range(8):
        times.overtaken("near", job, 0.9)
    assert times.is_slow("near", job, 1.0)


def test_a_server_that_is_always_late_is_left_alone(start_server, write):
    quick, late = start_server(num_workers=2), start_server(num_workers=2)
    late_url = SlowPath(late.url, delay_s=0.3).url
    client = client_of(quick.url, late_url, hedge_after_s=0.2)
    client.times._allowance = 0.0
    jobs = [job_for(write(f"picture {n}")) for n in range(60)]
    assert sum(first_choice(client, job) == late_url for job in jobs) > 20
    for job in jobs:
        assert client.fetch(job) is not None
    assert 8 <= late.pool.counts["jobs"] < 20, "eight of each are as many as it takes to know, or a few more"


def test_a_closed_client_ends_its_waits(start_server, write):
    server = start_server(num_workers=1, queue_jobs=0)
    slow = clip_job(write("sleep 0.2"), 4)
    with ThreadPoolExecutor(1) as threads:
        blocking = threads.submit(post, server.url, slow)
        wait_until(lambda: server.pool.running)
        client = client_of(server.url)
        waiting = threading.Timer(0.2, client.close)
        waiting.start()
        began_s = time.monotonic()
        assert client.fetch(job_for(write("picture"))) is None
        assert time.monotonic() - began_s < 1.0
        assert blocking.result()[0] == 200
