"""Servers as processes of their own, started by the `keye` command."""

import json
import subprocess
import sys
import threading


class ServerProcess:
    """`keye io-server` on a free port of this machine. What it logs is read as it comes."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "megatron_keye.train.cli", "io-server", "--listen", "127.0.0.1:0", *arguments]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._events: dict[str, dict] = {}
        self._changed = threading.Condition()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stderr:
            if line.startswith("{"):
                event = json.loads(line)
                with self._changed:
                    self._events[event["event"]] = event
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, event: str, timeout_s: float = 60.0) -> dict:
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended or event in self._events, timeout_s), f"no event {event!r}"
            return self._events[event]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return self.wait_for("listening")["url"]

    def terminate(self) -> int:
        """Ask it to end; its exit code."""
        self.ask_to_end()
        return self._process.wait(30)

    def ask_to_end(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)
