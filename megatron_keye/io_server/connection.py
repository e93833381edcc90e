"""One HTTP/1.1 connection of the server: h11 judges the protocol, asyncio moves the bytes.

h11 is pure Python without dependencies and leaves the sockets to us, so a result goes to the network from its mapped memory file. Not by
sendfile: packets made of single pages cost both ends twice the time of those that the kernel copies together.
"""

import asyncio
import select
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import h11

from megatron_keye.data.slabs import Slab
from megatron_keye.io_server.protocol import Refused

READ_BYTES = 1 << 16
MAX_HEADER_BYTES = 1 << 14
IDLE_S = 120.0
"""An open connection without a request is closed after this long, where its client may ask for media."""
NEW_IDLE_S = 10.0
"""The same while that is not known: places are few, and clients of ours ask at once."""
REQUEST_S = 10.0
"""A request that has begun must be here within this long."""
PIECE_BYTES = 4 << 20
PIECE_S = 10.0
"""A client that does not take a piece of its answer within this long is cut off."""
LINGER_S = 1.0
HANG_UP_S = 0.5
"""A client that sent requests ahead is looked after this often, while one of them is answered."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes


class Gone(Exception):
    """The client closed the connection, or was too slow to keep it."""


class Connection:
    """Requests one after another, each to be answered by `respond` before the next is asked for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_body_bytes: int):
        self._reader, self._writer = reader, writer
        self._max_body_bytes = max_body_bytes
        writer.transport.set_write_buffer_limits(high=0)  # `drain` waits until all is on its way
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        self._wants_body = True
        self._idle_s = NEW_IDLE_S

    @property
    def can_go_on(self) -> bool:
        """Whether another request may follow the answer; prepares for it."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def trust(self) -> None:
        """The client may ask for media, so that it may also keep the connection for later."""
        self._idle_s = IDLE_S

    async def next_request(self) -> Request | None:
        """None where the client is done. Raises Refused for what is no good request, and Gone."""
        self._wants_body = True
        try:
            async with asyncio.timeout(self._idle_s):
                head = await self._next_event()
            if not isinstance(head, h11.Request):
                return None
            self._wants_body = head.method != b"HEAD"
            async with asyncio.timeout(REQUEST_S):
                body = await self._body()
        except h11.RemoteProtocolError as error:
            raise Refused("bad_request", f"not HTTP/1.1 as it is spoken here: {error}") from error
        except TimeoutError as error:
            raise Gone from error
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        return Request(head.method.decode("latin-1"), head.target.decode("latin-1"), headers, body)

    async def respond(self, status: int, headers: Sequence[tuple[str, str]], body: bytes | Slab, *, keep_open: bool) -> None:
        """Send one answer, of which a HEAD request gets the head alone. Raises Gone where the client does not take it."""
        lines = [("content-length", str(len(body))), *headers]
        if not keep_open or self._http.their_state is not h11.DONE:
            lines.append(("connection", "close"))
        head = self._http.send(h11.Response(status_code=status, headers=lines))
        sent = body if self._wants_body else b""
        is_plain = isinstance(sent, bytes)
        if sent:
            self._http.send_with_data_passthrough(h11.Data(data=sent))  # counted, not touched
        try:
            async with asyncio.timeout(PIECE_S):
                self._writer.write(head + sent if is_plain else head)
                await self._writer.drain()
            if not is_plain:
                await self._send_slab(sent)
        except (OSError, TimeoutError) as error:
            self._writer.transport.abort()
            raise Gone from error
        self._http.send(h11.EndOfMessage())

    async def closed(self) -> None:
        """Returns when the client closes the connection. For use between request and answer.

        Requests that wait behind this one are not read on and on: their memory would be the client's to choose. So the kernel is asked
        whether the client is gone, which it knows also where there is more to read.
        """
        if not self._http.trailing_data[0]:
            if not (data := await self._reader.read(READ_BYTES)):
                return
            self._http.receive_data(data)
        while not self._has_hung_up():
            await asyncio.sleep(HANG_UP_S)

    async def linger(self) -> None:
        """Discard what the client still sends for a moment: closing on unread bytes would take back the answer."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while await self._reader.read(READ_BYTES):
                    pass

    async def close(self) -> None:
        """Ends within LINGER_S, also where the client takes nothing of what is left to send."""
        self._writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await self._writer.wait_closed()
        self._writer.transport.abort()

    def _has_hung_up(self) -> bool:
        if self._writer.is_closing():
            return True
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket"), select.POLLRDHUP)
        return bool(poll.poll(0))

    async def _next_event(self) -> h11.Event:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            try:
                self._http.receive_data(await self._reader.read(READ_BYTES))
            except OSError as error:
                raise Gone from error
        return event

    async def _body(self) -> bytes:
        body = bytearray()
        while isinstance(event := await self._next_event(), h11.Data):
            body += event.data
            if len(body) > self._max_body_bytes:
                raise Refused("too_large", f"the request has more than {self._max_body_bytes} bytes")
        if not isinstance(event, h11.EndOfMessage):
            raise Gone
        return bytes(body)

    async def _send_slab(self, slab: Slab) -> None:
        pixels = memoryview(slab.view())
        loop = asyncio.get_running_loop()
        # A duplicate, because a transport copies what does not go out at once. It holds nothing back: `respond` has drained it.
        with self._writer.get_extra_info("socket").dup() as sock:
            for start in range(0, len(pixels), PIECE_BYTES):
                async with asyncio.timeout(PIECE_S):
                    await loop.sock_sendall(sock, pixels[start : start + PIECE_BYTES])
