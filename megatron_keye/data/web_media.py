"""Images and videos at web addresses, for those who write shards: fetched within limits of size and time."""

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from typing import TypeVar

from megatron_keye.data.retry import Retries, Transient, with_retries
from megatron_keye.errors import DataError

MAX_BYTES = 1 << 30
TIMEOUT_S = 300.0
STALL_TIMEOUT_S = 30.0
RETRIES = Retries(attempts=4, first_pause_s=1.0)
TEMPORARY_STATUS = (408, 425, 429)
PART_BYTES = 1 << 20
Result = TypeVar("Result")
NOT_ASKED = (405, 501)
"""Statuses of servers that do not answer a question for the size alone."""


def web_bytes(url: str, where: str, max_bytes: int = MAX_BYTES, timeout_s: float = TIMEOUT_S, retries: Retries = RETRIES) -> bytes:
    """The bytes at `url`. Raises DataError, which begins with `where`, for what is missing, empty, too large, too slow, or does not come
    whole in any try."""

    def fetch(response: HTTPResponse) -> bytes:
        until_s = time.monotonic() + timeout_s
        body = bytearray()
        while part := response.read(PART_BYTES):
            body += part
            if len(body) > max_bytes:
                raise DataError(f"{where}: {url} has more than {max_bytes:,} bytes; make it smaller, or fetch it and name the file")
            if time.monotonic() > until_s:
                raise DataError(f"{where}: {url} took more than {timeout_s:g} s; fetch it and name the file")
        expected = response.headers.get("Content-Length")
        if expected is not None and int(expected) != len(body):
            raise Transient(f"found {len(body)} of {expected} bytes")
        if not body:
            raise DataError(f"{where}: {url} is empty; correct the address, or remove the record")
        return bytes(body)

    return _ask(url, "GET", fetch, where, retries)


def web_num_bytes(url: str, where: str, retries: Retries = RETRIES) -> int:
    """The size of what is at `url`, 0 where the server does not say. Raises DataError for what is missing."""
    return _ask(url, "HEAD", lambda response: int(response.headers.get("Content-Length") or 0), where, retries)


def _ask(url: str, method: str, use: Callable[[HTTPResponse], Result], where: str, retries: Retries) -> Result | int:
    def attempt() -> Result | int:
        try:
            request = urllib.request.Request(url, method=method, headers={"User-Agent": "megatron_keye"})
            with urllib.request.urlopen(request, timeout=STALL_TIMEOUT_S) as response:
                return use(response)
        except urllib.error.HTTPError as error:
            if method == "HEAD" and error.code in NOT_ASKED:
                return 0
            if error.code >= 500 or error.code in TEMPORARY_STATUS:
                raise Transient(f"HTTP status {error.code}") from error
            found = f"HTTP status {error.code} {error.reason}"
            raise DataError(f"{where}: {url}: found {found}; correct the address, or remove the record") from error
        except (OSError, HTTPException) as error:  # URLError is an OSError
            raise Transient(f"{type(error).__name__}: {error}") from error
        except ValueError as error:
            raise DataError(f"{where}: {url} is no web address: {error}") from error

    try:
        return with_retries(attempt, retries)
    except Transient as error:
        raise DataError(f"{where}: {url}: no whole answer in {retries.attempts} tries, the last: {error}; try again later") from error
