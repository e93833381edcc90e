"""One connection to a server, used in ways that no client of ours would."""

import http.client
import socket
import time
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from megatron_keye.io_server.connection import READ_BYTES, Connection
from megatron_keye.io_server.protocol import DECODE_PATH
from tests.unit.io_server.serving import job_for, request, wait_until

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


def test_an_open_connection_holds_no_result(start_server, write):
    server = start_server()
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    connection.request("POST", DECODE_PATH, job_for(write("picture"), sha256=None).model_dump_json())
    assert connection.getresponse().read()
    wait_until(lambda: not server.front._budget.used_bytes, timeout_s=5.0)
    assert len(server.front._connections) == 1
    connection.close()
