"""What is asked in a wrong way, by mistake or on purpose: a typed error, never another file's content, and the server goes on."""

import json
import os
import socket
from urllib.parse import urlsplit

import pytest

from megatron_keye.io_server.protocol import MAX_REQUEST_BYTES
from tests.unit.io_server.serving import MIB, error_of, expected, is_well, job_for, post, request

BAD_JOBS = {
    "a span behind the end": (dict(offset=1 << 40), 422, "corrupt"),
    "a span longer than the file": (dict(num_bytes=1 << 50), 422, "corrupt"),
    "another checksum": (dict(sha256="0" * 64), 422, "corrupt"),
    "no such file": (dict(path="{root}/none"), 404, "missing"),
    "a file outside": (dict(path="/etc/passwd"), 403, "forbidden_path"),
    "none there outside either": (dict(path="/etc/no/such/file"), 403, "forbidden_path"),
    "dots": (dict(path="{root}/../secret"), 403, "forbidden_path"),
    "a link that leads outside": (dict(path="{root}/link"), 403, "forbidden_path"),
    "a link to a folder outside": (dict(path="{root}/folder/secret"), 403, "forbidden_path"),
    "a folder": (dict(path="{root}"), 403, "forbidden_path"),
    "a pipe": (dict(path="{root}/pipe"), 403, "forbidden_path"),
    "a relative path": (dict(path="c"), 403, "forbidden_path"),
    "a null byte": (dict(path="/etc/passwd\0{root}"), 403, "forbidden_path"),
    "another decoder": (dict(decoder_id="other"), 409, "wrong_decoder"),
    "more than fits": (dict(sizes=((28 * 400, 28 * 400),)), 413, "too_large"),
}


@pytest.mark.parametrize(("changes", "status", "code"), BAD_JOBS.values(), ids=BAD_JOBS)
def test_a_bad_job_gets_a_typed_error(plain, changes, status, code):
    server, root = plain
    (path := root / "c").write_bytes(b"fine")
    (root.parent / "secret").write_bytes(b"fine")
    if not (root / "link").exists():
        (root / "link").symlink_to(root.parent / "secret")
        (root / "folder").symlink_to(root.parent)
        os.mkfifo(root / "pipe")
    changes = {name: value.format(root=root) if isinstance(value, str) else value for name, value in changes.items()}
    assert error_of(post(server.url, job_for(path, **changes))) == (status, code)
    assert is_well(server, path)


def test_a_link_inside_the_roots_is_followed(plain):
    server, root = plain
    (path := root / "target").write_bytes(b"fine")
    if not (root / "inner").exists():
        (root / "inner").symlink_to(path)
    job = job_for(path, path=str(root / "inner"))
    assert post(server.url, job)[2] == expected(job, path)


BAD_BODIES = {
    "nothing": b"",
    "no JSON": b"decode, please",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "deeply nested": b"[" * 100_000,
    "another type": b'{"path": 5}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_is_no_job_is_refused(plain, body):
    assert error_of(request(plain[0].url, body)) == (400, "bad_request")


BAD_FIELDS = {
    "no such field": dict(command="rm"),
    "sizes that are no multiples": dict(sizes=[[30, 30]]),
    "a size of nothing": dict(sizes=[[0, 28]]),
    "frames backwards": dict(frames=[3, 2], sizes=[[28, 28], [28, 28]], fast=[False, False]),
    "tags that do not fit": dict(frames=[1, 2], sizes=[[28, 28], [28, 28]], fast=[True]),
    "one size for slow and fast": dict(frames=[1], fast=[True]),
    "a number as text": dict(offset="0"),
    "a negative offset": dict(offset=-1),
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_field_that_makes_no_sense_is_refused(plain, fields):
    server, root = plain
    (path := root / "d").write_bytes(b"fine")
    body = json.dumps(json.loads(job_for(path).model_dump_json()) | fields).encode()
    assert error_of(request(server.url, body)) == (400, "bad_request")


def test_a_giant_request_is_refused_and_other_paths_are_not_found(plain):
    server, _ = plain
    for num_bytes in (MAX_REQUEST_BYTES + 1, 8 * MIB):
        assert error_of(request(server.url, b" " * num_bytes)) == (413, "too_large")
    assert error_of(request(server.url, b"", path="/etc/passwd")) == (404, "not_found")
    assert error_of(request(server.url, b"", method="GET")) == (404, "not_found")


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"POST " + b"a" * 40_000, b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"])
def test_what_is_not_http_gets_400_and_the_connection_ends(plain, data):
    address = urlsplit(plain[0].url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        sock.sendall(data)
        received = b""
        while part := sock.recv(4096):
            received += part
    assert received.startswith(b"HTTP/1.1 400")


def test_a_truncated_body_gets_400(plain):
    server, root = plain
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        sock.sendall(b"POST /v1/decode HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(4096).startswith(b"HTTP/1.1 400")
    (path := root / "e").write_bytes(b"fine")
    assert is_well(server, path)
