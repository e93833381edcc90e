"""Several servers as one command: all of them serve, one that is lost is replaced, and they end together."""

import os
import signal
import socket
from pathlib import Path

import pytest

from megatron_keye.io_server.front import ServerSettings
from megatron_keye.io_server.pool import PoolSettings
from megatron_keye.io_server.registry import live_leases
from megatron_keye.io_server.several import shared_out
from megatron_keye.io_server.worker import WorkerLimits
from megatron_keye.train import cli
from tests.unit.io_server.processes import ServerProcess
from tests.unit.io_server.serving import FAKE_WORKER, wait_until
from tests.unit.io_server.test_command import children_of, is_running


@pytest.mark.parametrize(("workers", "queue", "servers", "port"), [(7, 28, 3, 7300), (2, 1, 2, 0), (64, 256, 4, 1)])
def test_workers_queue_and_ports_are_shared_out(workers, queue, servers, port):
    settings = ServerSettings("127.0.0.1", port, PoolSettings(workers, queue, ("/",), WorkerLimits(1, 1.0), FAKE_WORKER), 1 << 30, 1.0)
    parts = shared_out(settings, servers)
    assert [part.port for part in parts] == [port and port + n for n in range(servers)]
    for total, own in ((workers, [part.pool.num_workers for part in parts]), (queue, [part.pool.queue_jobs for part in parts])):
        assert sum(own) == total
        assert max(own) - min(own) <= 1
    assert all(part.memory_bytes == 1 << 30 for part in parts)


def servers_of(pid: int) -> list[int]:
    """The processes of its servers; the library has another one that cleans up."""
    return [child for child in children_of(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def urls(registry: Path) -> set[str]:
    return {lease.url for lease in live_leases(registry)}


def test_servers_are_found_replaced_and_ended_together(tmp_path, capsys):
    registry = tmp_path / "registry"
    command = ServerProcess("--root", str(tmp_path), "--registry", str(registry), "--workers", "2", "--servers", "2")
    wait_until(lambda: len(urls(registry)) == 2, timeout_s=60.0)
    before = urls(registry)
    assert cli.main(["io-server", "status", *before]) == 0
    assert capsys.readouterr().out.count("workers 1") == 2
    os.kill(servers_of(command.pid)[0], signal.SIGKILL)
    assert command.wait_for("server lost")["signal"] == signal.SIGKILL
    wait_until(lambda: len(urls(registry)) == 3, timeout_s=60.0)  # the lost one's lease goes on for a while
    new = urls(registry) - before
    assert cli.main(["io-server", "status", *new]) == 0
    servers = servers_of(command.pid)
    assert len(servers) == 2
    assert command.terminate() == 0
    assert not any(is_running(pid) for pid in servers)
    assert not new & urls(registry)


def test_servers_end_with_the_command_that_is_killed(tmp_path):
    command = ServerProcess("--root", str(tmp_path), "--workers", "2", "--servers", "2")
    command.wait_for("listening")
    servers = servers_of(command.pid)
    workers = [worker for server in servers for worker in children_of(server)]
    assert len(servers) == 2
    command.kill()
    wait_until(lambda: not any(is_running(pid) for pid in [*servers, *workers]), timeout_s=10.0)


def test_one_that_cannot_start_ends_all(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = ["--listen", f"127.0.0.1:{port - 1}", "--root", str(tmp_path), "--workers", "2", "--servers", "2"]
        assert cli.main(["io-server", *given]) == 1
        assert "already in use" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("servers", "port", "problem"),
    [(3, 0, "--servers is 3: expected from 1 to --workers"), (0, 0, "--servers is 0"), (2, 65535, "as many ports from there on")],
)
def test_more_servers_than_workers_or_ports_are_settings_errors(tmp_path, servers, port, problem, capsys):
    given = ["--listen", f"127.0.0.1:{port}", "--root", str(tmp_path), "--workers", "2", "--servers", str(servers)]
    assert cli.main(["io-server", *given]) == 65
    assert problem in capsys.readouterr().err
