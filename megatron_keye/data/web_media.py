"""Images and videos at web addresses: fetched within limits of size and time, and never from inside a network unless settings name it."""

import asyncio
import hashlib
import ipaddress
import re
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import aiohttp

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.retry import Retries, Transient, with_retries
from megatron_keye.data.span_cache import open_cache
from megatron_keye.data.storage import ByteCounter
from megatron_keye.errors import DataError, MediumUnreachableError

MAX_REDIRECTS = 5
PART_BYTES = 1 << 20
TEMPORARY_STATUS = (408, 425, 429)
NOT_ASKED = (405, 501)
"""Statuses of servers that do not answer a question for the size alone."""
HEADERS = {"User-Agent": "megatron_keye", "Accept-Encoding": "identity"}
SETTINGS = ("attempts", "first_pause_s", "timeout_s", "medium_bytes", "medium_timeout_s", "private_networks")
"""Settings of `data.storage` that decide how media are fetched."""
Result = TypeVar("Result")
Use = Callable[[aiohttp.ClientResponse], Awaitable[Result]]


class WebMedia:
    """Indexed media at web addresses; what was fetched is kept in this machine's cache. May be used from several threads."""

    def __init__(self, settings: StorageConfig):
        """Raises SettingsError for a cache that cannot be made."""
        self._settings, self._cache, self._counter = settings, open_cache(settings), ByteCounter()

    def read(self, url: str, sha256: str, where: str) -> bytes:
        """The bytes at `url`. Raises DataError as `web_bytes` does, and where they do not have the checksum any more."""
        key = f"{url} {sha256}"
        if self._cache is not None and (cached := self._cache.get(key)) is not None:
            return cached
        blob = web_bytes(url, where, self._settings)
        self._counter.add(len(blob))
        if hashlib.sha256(blob).hexdigest() != sha256:
            what = f"{where}: {shown(url)}"
            raise DataError(f"{what} has changed since it was indexed; remove the record, or run data_tools/index_shards.py again")
        if self._cache is not None:
            self._cache.put(key, blob)
        return blob

    def bytes_read(self) -> int:
        """Bytes that were fetched so far."""
        return self._counter.total


def web_bytes(url: str, where: str, settings: StorageConfig) -> bytes:
    """The bytes at `url`. Raises DataError, which begins with `where`, for what is missing, empty, too large or forbidden;
    MediumUnreachableError for what is too slow, or does not come whole in any try."""

    what = f"{where}: {shown(url)}"

    async def fetch(response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for part in response.content.iter_chunked(PART_BYTES):
            body += part
            if len(body) > settings.medium_bytes:
                raise DataError(
                    f"{what} has more than {settings.medium_bytes:,} bytes (data.storage.medium_bytes); raise it, or remove the record"
                )
        if not body:
            raise DataError(f"{what} is empty; correct the address, or remove the record")
        return bytes(body)

    return _ask(url, "GET", fetch, what, settings)


def web_num_bytes(url: str, where: str, settings: StorageConfig) -> int:
    """The size of what is at `url`, 0 where the server does not say. Raises as `web_bytes` does."""

    async def size(response: aiohttp.ClientResponse) -> int:
        return 0 if response.status in NOT_ASKED else response.content_length or 0

    return _ask(url, "HEAD", size, f"{where}: {shown(url)}", settings)


def shown(url: str) -> str:
    """An address as logs and ledgers may have it: without its query and credentials, which let whoever reads them in."""
    scheme, _, rest = re.split("[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _ask(url: str, method: str, use: Use, what: str, settings: StorageConfig) -> Result:
    """What `use` makes of the answer."""
    until_s = time.monotonic() + settings.medium_timeout_s

    def attempt() -> Result:
        try:
            return asyncio.run(_request(url, method, use, what, settings, max(until_s - time.monotonic(), 1e-3)))
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise DataError(f"{what}: found the address {error}, expected one of http or https; correct it") from error
        except aiohttp.TooManyRedirects as error:
            raise DataError(f"{what} leads on more than {MAX_REDIRECTS} times; correct the address") from error
        except (OSError, aiohttp.ClientError) as error:  # TimeoutError is an OSError
            if time.monotonic() >= until_s:
                raise MediumUnreachableError(
                    f"{what} took more than {settings.medium_timeout_s:g} s (data.storage.medium_timeout_s); raise it, or try later"
                ) from error
            raise Transient(f"{type(error).__name__}: {error}") from error

    try:
        return with_retries(attempt, Retries(settings.attempts, settings.first_pause_s))
    except Transient as error:
        raise MediumUnreachableError(
            f"{what}: no whole answer in {settings.attempts} tries, the last: {error}; try again later"
        ) from error


async def _request(url: str, method: str, use: Use, what: str, settings: StorageConfig, total_s: float) -> Result:
    """One try. Raises Transient and DataError for statuses, and what aiohttp does."""
    pause_s = settings.timeout_s
    timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=pause_s, sock_read=pause_s)
    connector = aiohttp.TCPConnector(socket_factory=partial(_allowed_socket, settings, what))
    options = dict(headers=HEADERS, timeout=timeout, connector=connector, trust_env=True, auto_decompress=False)
    async with (
        aiohttp.ClientSession(**options) as session,
        session.request(method, url, allow_redirects=True, max_redirects=MAX_REDIRECTS) as response,
    ):
        _check_status(response, what)
        return await use(response)


def _check_status(response: aiohttp.ClientResponse, where: str) -> None:
    """Raises Transient for a status that another try may not meet, DataError for one that it will."""
    if response.status < 400 or (response.method == "HEAD" and response.status in NOT_ASKED):
        return
    if response.status >= 500 or response.status in TEMPORARY_STATUS:
        raise Transient(f"HTTP status {response.status}")
    raise DataError(f"{where}: found HTTP status {response.status} {response.reason}; correct the address, or remove the record")


def _allowed_socket(settings: StorageConfig, where: str, address: tuple) -> socket.socket:
    """A socket for an address of `getaddrinfo`, which is the one that is then connected to, after redirects as before.

    Raises DataError for one that is not public, such as that of a machine's own services, unless the settings allow it.
    """
    family, kind, protocol, _, (host, *_) = address
    found = ipaddress.ip_address(host.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    if not found.is_global and not any(found in network for network in settings.private_networks):
        raise DataError(f"{where} lies at {found}, which is not public; list its network in data.storage.private_networks to allow it")
    return socket.socket(family, kind, protocol)
