"""Servers as processes of their own, started by the `keye` command."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit


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


class SlowPath:
    """A port of this machine that leads to a server, and delivers each request late. For one test; its threads end with the process."""

    def __init__(self, url: str, delay_s: float):
        address = urlsplit(url)
        self._target, self._delay_s = (address.hostname, address.port), delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._target)
            for source, target, delay_s in ((client, server, self._delay_s), (server, client, 0.0)):
                threading.Thread(target=self._forward, args=(source, target, delay_s), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, delay_s: float) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(delay_s)
                target.sendall(data)
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
