"""Messages between a process and its workers over a Unix socket pair: a length, then JSON; a file descriptor may ride along."""

import asyncio
import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")


class Closed(Exception):
    """The other side is gone."""


def encode(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


def send(sock: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    """Raises Closed."""
    data = encode(message)
    try:
        sent = 0 if fd is None else socket.send_fds(sock, [data[: _LENGTH.size]], [fd])
        sock.sendall(data[sent:])
    except OSError as error:
        raise Closed from error


def receive(sock: socket.socket) -> tuple[dict[str, Any], int | None]:
    """The next message and the descriptor that came with it. Raises Closed, and TimeoutError where `sock` has a timeout."""
    head, fds = b"", []
    while len(head) < _LENGTH.size:
        try:
            part, more, _, _ = socket.recv_fds(sock, _LENGTH.size - len(head), 1)
        except ConnectionError as error:
            raise Closed from error
        if not part:
            raise Closed
        head += part
        fds += more
    body = bytearray()
    (length,) = _LENGTH.unpack(head)
    while len(body) < length:
        part = sock.recv(length - len(body))
        if not part:
            raise Closed
        body += part
    return json.loads(body), fds[0] if fds else None


async def send_async(sock: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    """Raises Closed. `sock` is non-blocking."""
    data = encode(message)
    try:
        sent = 0 if fd is None else socket.send_fds(sock, [data[: _LENGTH.size]], [fd])
        await asyncio.get_running_loop().sock_sendall(sock, data[sent:])
    except OSError as error:
        raise Closed from error


async def receive_async(sock: socket.socket) -> dict[str, Any]:
    """Raises Closed. `sock` is non-blocking."""
    (length,) = _LENGTH.unpack(await _exactly(sock, _LENGTH.size))
    return json.loads(await _exactly(sock, length))


async def _exactly(sock: socket.socket, num_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < num_bytes:
        try:
            part = await loop.sock_recv(sock, num_bytes - len(data))
        except OSError as error:
            raise Closed from error
        if not part:
            raise Closed
        data += part
    return bytes(data)
