"""A server that is late, for benchmarks and tests: a port of this machine that delivers its requests late."""

import socket
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit


class SlowPath:
    """A port of this machine that leads to a server, and delivers each request late. Its threads end with the process."""

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
