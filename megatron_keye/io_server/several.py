"""Several servers of one machine as one command. A server's front is a single thread, which a few dozen workers keep busy, so many workers
are shared out among servers, each at a port of its own."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import connection
from multiprocessing.context import SpawnProcess

from megatron_keye.data.limits import end_with_parent
from megatron_keye.errors import KeyeError
from megatron_keye.io_server.events import log_event
from megatron_keye.io_server.front import ServerSettings

WORKERS_PER_SERVER = 16
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
RESTART_PAUSE_S = 1.0

Serve = Callable[[ServerSettings], None]
"""Runs one server until SIGTERM or SIGINT."""


def shared_out(settings: ServerSettings, num_servers: int) -> list[ServerSettings]:
    """The workers and the queue of `settings` among servers at as many ports from its own on, or at free ones where that is 0."""
    pool = settings.pool
    return [
        replace(
            settings,
            port=settings.port and settings.port + number,
            pool=replace(
                pool,
                num_workers=_share(pool.num_workers, num_servers, number),
                queue_jobs=_share(pool.queue_jobs, num_servers, number),
            ),
        )
        for number in range(num_servers)
    ]


def run_servers(serve: Serve, settings: Sequence[ServerSettings]) -> int:
    """Run a process for each of `settings` until SIGTERM or SIGINT, which they all get. One that a signal ended is replaced; one that
    ends with an error ends all. Returns that error's exit code, or 0. If this process is killed, so are they."""
    servers = _Servers(serve, settings)
    handlers = {number: signal.signal(number, servers.stop) for number in STOP_SIGNALS}
    try:
        return servers.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Servers:
    def __init__(self, serve: Serve, settings: Sequence[ServerSettings]):
        self._serve, self._settings = serve, settings
        self._running: dict[int, SpawnProcess] = {}
        """By place in `settings`."""
        self._is_stopping = False

    def run(self) -> int:
        exit_code = 0
        for place in range(len(self._settings)):
            self._start(place)
        while self._running:
            connection.wait([process.sentinel for process in self._running.values()])
            for place, process in [(place, process) for place, process in self._running.items() if process.exitcode is not None]:
                del self._running[place]
                if process.exitcode > 0:
                    exit_code = exit_code or process.exitcode
                    self.stop()
                elif process.exitcode < 0 and not self._is_stopping:
                    log_event("server lost", signal=-process.exitcode)
                    time.sleep(RESTART_PAUSE_S)
                    self._start(place)
        return exit_code

    def stop(self, *_: object) -> None:
        """Also a signal's handler; a second signal reaches the servers too."""
        self._is_stopping = True
        for process in self._running.values():
            process.terminate()

    def _start(self, place: int) -> None:
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(self._serve, self._settings[place], os.getpid()))
        process.start()
        self._running[place] = process
        if self._is_stopping:  # since before it could be told
            process.terminate()


def _run(serve: Serve, settings: ServerSettings, parent_pid: int) -> None:
    """The program of one server's process."""
    end_with_parent(parent_pid)
    try:
        serve(settings)
    except KeyeError as error:
        print(f"keye: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _share(total: int, num_servers: int, number: int) -> int:
    return total // num_servers + (number < total % num_servers)
