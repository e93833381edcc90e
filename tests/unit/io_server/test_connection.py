"""One connection to a server, used in ways that no client of ours would."""

import http.client
import json
import socket
import time
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from megatron_keye.io_server import auth
from megatron_keye.io_server.connection import READ_BYTES, Connection
from megatron_keye.io_server.protocol import DECODE_PATH, METRICS_PATH
from tests.unit.io_server.serving import clip_job, job_for, post, request, wait_until

SECRET = b"0123456789abcdef0123456789abcdef"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def connect():
    """Open connections to a server, which close with the test."""
    opened = []

    def to(server) -> socket.socket:
        address = urlsplit(server.url)
        opened.append(socket.create_connection((address.hostname, address.port), timeout=10))
        return opened[-1]

    yield to
    for sock in opened:
        sock.close()


def send_requests_until_nothing_is_taken(sock):
    """Thousands of requests whose answers nobody reads."""
    sock.settimeout(0.5)
    with suppress(TimeoutError):
        while True:
            sock.sendall(HEALTH * 200)


def test_head_requests_get_a_head_alone_and_the_connection_goes_on(start_server, connect, capfd):
    server = start_server()
    sock = connect(server)
    for _ in range(2):
        sock.sendall(HEALTH.replace(b"GET", b"HEAD"))
        answer = sock.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200") and b"content-length: " in answer and answer.endswith(b"\r\n\r\n")
    sock.sendall(HEALTH)
    assert sock.recv(1 << 16).endswith(b"}")
    assert request(server.url, b"", method="HEAD", path="/no/such")[0] == 404
    sock.sendall(HEALTH.replace(b"GET", b"HEAD").replace(b"Host", b"no header"))
    assert sock.recv(1 << 16).startswith(b"HTTP/1.1 400")
    assert "Traceback" not in capfd.readouterr().err


def test_requests_sent_ahead_are_answered_in_turn(start_server, connect):
    sock = connect(start_server())
    sock.sendall(HEALTH * 50)
    sock.shutdown(socket.SHUT_WR)
    received = b""
    while part := sock.recv(1 << 16):
        received += part
    assert received.count(b"HTTP/1.1 200") == 50


@pytest.mark.parametrize("num_ahead", [1, 20_000])
def test_a_client_that_sends_ahead_and_vanishes_frees_the_worker(start_server, connect, write, num_ahead):
    server = start_server(decode_s=30.0)
    body = clip_job(write("sleep 0.1"), 200).model_dump_json().encode()
    sock = connect(server)
    sock.sendall(b"POST /v1/decode HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    wait_until(lambda: server.pool.running)
    sock.sendall(HEALTH * num_ahead)
    time.sleep(0.1)
    assert server.pool.running
    sock.close()
    wait_until(lambda: not server.pool.running, timeout_s=3.0)
    assert server.pool.counts["cancelled"] == 1


def test_requests_sent_ahead_take_no_more_memory_than_one_piece(start_server, connect, monkeypatch):
    """Whoever sends requests without end is not read on and on, while one of them is answered."""
    connections = []

    def kept(*arguments):
        connections.append(Connection(*arguments))
        return connections[-1]

    monkeypatch.setattr("megatron_keye.io_server.front.Connection", kept)
    send_requests_until_nothing_is_taken(connect(start_server()))
    (connection,) = connections
    assert len(connection._http.trailing_data[0]) <= 2 * READ_BYTES


def test_a_client_that_takes_nothing_does_not_keep_a_server_from_ending(start_server, connect):
    server = start_server(drain_s=0.2)
    send_requests_until_nothing_is_taken(connect(server))
    wait_until(lambda: server.front._busy)
    began_s = time.monotonic()
    server.close()
    assert time.monotonic() - began_s < 5.0


def test_who_finds_no_place_is_told_and_counted(start_server, connect, write):
    server = start_server()
    server.front._max_connections = 2
    held = [connect(server) for _ in range(2)]
    wait_until(lambda: len(server.front._connections) == 2)
    status, headers, body = post(server.url, job_for(path := write("picture")))
    assert (status, json.loads(body)["error"], headers["retry-after"]) == (503, "busy", "1")
    held.pop().close()
    wait_until(lambda: len(server.front._connections) == 1)
    assert post(server.url, job_for(path))[0] == 200
    assert b"keye_io_connections_refused_total 1\n" in request(server.url, b"", method="GET", path=METRICS_PATH)[2]


def test_who_was_never_allowed_to_ask_keeps_no_place_for_long(start_server, connect, write, monkeypatch):
    monkeypatch.setattr("megatron_keye.io_server.connection.NEW_IDLE_S", 0.3)
    server = start_server(secret=SECRET)
    strangers = [connect(server) for _ in range(3)]
    strangers[1].sendall(HEALTH)
    assert strangers[1].recv(1 << 16).startswith(b"HTTP/1.1 200")
    strangers[2].sendall(b"POST /v1/decode HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
    assert strangers[2].recv(1 << 16).startswith(b"HTTP/1.1 403")
    address = urlsplit(server.url)
    client = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    body = job_for(write("picture")).model_dump_json().encode()
    for pause_s in (0.0, 0.6):
        time.sleep(pause_s)
        client.request("POST", DECODE_PATH, body, {"Authorization": auth.sign(SECRET, DECODE_PATH, body, time.time())})
        own_socket = client.sock
        assert client.getresponse().read() and client.sock is own_socket
    assert all(sock.recv(1 << 16) == b"" for sock in strangers)
    assert len(server.front._connections) == 1
    client.close()


def test_an_open_connection_holds_no_result(start_server, write):
    server = start_server()
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    connection.request("POST", DECODE_PATH, job_for(write("picture"), sha256=None).model_dump_json())
    assert connection.getresponse().read()
    wait_until(lambda: not server.front._budget.used_bytes, timeout_s=5.0)
    assert len(server.front._connections) == 1
    connection.close()
