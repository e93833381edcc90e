"""Servers and files for the tests of this folder."""

import pytest

from tests.unit.data.conftest import corpus, indexed, tokenizer, tokenizer_folder  # noqa: F401
from tests.unit.io_server.serving import RunningServer, real_server


@pytest.fixture
def start_server(tmp_path):
    """Start servers that end with the test: start_server(root=tmp_path, **settings)."""
    servers = []

    def start(root=tmp_path, **settings) -> RunningServer:
        servers.append(RunningServer(root, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def write(tmp_path):
    """Write a file below the root: what a fake worker is to do."""

    def write_file(content: str, name: str | None = None):
        path = tmp_path / (name or content.replace("/", "_")[:40].replace(" ", "-"))
        path.write_bytes(content.encode())
        return path

    return write_file


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """A server with one real worker, whose root is the folder of all the session's temporary files."""
    server = real_server(tmp_path_factory.getbasetemp(), decode_s=60.0)
    yield server
    server.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A server for requests that leave it as it was, and its root."""
    root = tmp_path_factory.mktemp("plain")
    server = RunningServer(root)
    yield server, root
    server.close()
