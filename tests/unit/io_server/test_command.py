"""`keye io-server` as people start it: arguments, status, signals."""

import http.client
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_keye.io_server.registry import live_leases
from megatron_keye.train import cli
from tests.unit.io_server.processes import ServerProcess
from tests.unit.io_server.serving import FAKE_WORKER, job_for, post, request, wait_until


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--listen is None: expected HOST:PORT"),
        (["--listen", "7300"], "--listen is '7300'"),
        (["--listen", "127.0.0.1:99999"], "expected HOST:PORT"),
        (["--listen", "127.0.0.1:0"], "name at least one folder or URL with --root"),
        (["--listen", "127.0.0.1:0", "--root", "/no/such"], "--root /no/such: no such folder"),
        (["--listen", "127.0.0.1:0", "--root", "/tmp", "--workers", "0"], "--workers is 0: expected more than 0"),
        (["--listen", "127.0.0.1:0", "--root", "/tmp", "--disk-cache-gib", "inf"], "--disk-cache-gib is inf: expected more than 0"),
        (["--listen", "127.0.0.1:0", "--root", "/tmp", "--drain-s", "nan"], "--drain-s is nan: expected more than 0"),
        (["--listen", "127.0.0.1:0", "--root", "/tmp", "--queue", "-1"], "--queue is -1: expected 0 or more"),
        (["--listen", "127.0.0.1:0", "--root", "/tmp", "--advertise", "http://node1"], "expected the name or address of this machine"),
        (["--listen", "127.0.0.1:0", "--root", ""], "--root is empty"),
        (["--listen", "127.0.0.1:0", "--root", "/no/such", "--root", "/tmp"], "--root /no/such: no such folder"),
        (["--listen", "127.0.0.1:0", "--root", "/tmp", "--registry", "/proc/none"], "--registry /proc/none: cannot make it"),
        (["status"], "name servers by URL, or by --registry"),
        (["status", "--registry", "/no/such"], "no server has a valid lease in /no/such"),
        (["status", "node1:7300"], "found node1:7300: expected http://HOST:PORT"),
        (["--listen", "0.0.0.0:0", "--root", "/tmp"], "without --secret-file"),
        (["--listen", "127.0.0.1:0", "--root", "/tmp", "--disk-cache", "/tmp/cache"], "lies in a --root"),
    ],
)
def test_arguments_that_make_no_server_are_settings_errors(arguments, problem, capsys):
    assert cli.main(["io-server", *arguments]) == 65
    assert problem in capsys.readouterr().err


def test_a_port_that_is_taken_may_be_free_at_another_attempt_an_address_of_others_never(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_keye.train.commands.io_server.worker_command", lambda decoder: FAKE_WORKER)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for address, code, problem in (
            (f"127.0.0.1:{taken.getsockname()[1]}", 1, "already in use; end what listens there"),
            ("192.0.2.1:0", 65, "name an address of this machine"),
        ):
            (tmp_path / "secret").write_text("a secret of this test only")
            (tmp_path / "secret").chmod(0o600)
            given = ["--listen", address, "--root", str(tmp_path), "--secret-file", str(tmp_path / "secret")]
            assert cli.main(["io-server", *given]) == code
            assert problem in capsys.readouterr().err


def test_a_decoder_that_is_missing_is_a_settings_error(tmp_path, capfd, monkeypatch):
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").touch()  # which hides the real one
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main(["io-server", "--listen", "127.0.0.1:0", "--root", str(tmp_path), "--decoder", "dali"]) == 65
    assert "pip install 'megatron_keye[dali]'" in capfd.readouterr().err


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """A dead process that nobody waited for is not running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_announces_itself_tells_its_status_and_ends_when_asked(tmp_path, capsys):
    server = ServerProcess("--root", str(tmp_path), "--registry", str(tmp_path / "registry"), "--advertise", "localhost")
    url = server.url
    wait_until(lambda: live_leases(tmp_path / "registry"))
    assert [lease.url for lease in live_leases(tmp_path / "registry")] == [url]
    assert cli.main(["io-server", "status", url]) == 0
    assert "status ok" in capsys.readouterr().out
    assert cli.main(["io-server", "status", "--registry", str(tmp_path / "registry")]) == 0
    assert f"{url}  status ok" in capsys.readouterr().out
    workers = children_of(server.pid)
    assert len(workers) == 1
    assert server.terminate() == 0
    assert not list((tmp_path / "registry").glob("*.json"))
    assert cli.main(["io-server", "status", url]) == 1
    assert "no answer" in capsys.readouterr().out
    assert not any(is_running(pid) for pid in workers)


def test_a_server_that_is_asked_twice_ends_at_once(tmp_path):
    server = ServerProcess("--root", str(tmp_path))
    decoder_id = server.wait_for("listening")["decoder_id"]
    (worker,) = children_of(server.pid)
    os.kill(worker, signal.SIGSTOP)  # so that there is something to wait for
    (path := tmp_path / "picture").write_bytes(b"of something")
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(post, server.url, job_for(path, decoder_id=decoder_id))
        wait_until(lambda: json.loads(request(server.url, b"", method="GET", path="/healthz")[2])["running"])
        server.ask_to_end()
        server.wait_for("draining")
        server.ask_to_end()  # the same signal, passed on by a batch script
        time.sleep(1.5)
        assert is_running(server.pid)
        began_s = time.monotonic()
        assert server.terminate() == -signal.SIGTERM
        assert time.monotonic() - began_s < 2.0
        assert isinstance(asking.exception(10), OSError | http.client.HTTPException)
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not is_running(worker), timeout_s=10.0)


def test_workers_end_with_a_front_that_is_killed(tmp_path):
    server = ServerProcess("--root", str(tmp_path), "--workers", "1")
    server.wait_for("listening")
    workers = children_of(server.pid)
    assert workers
    assert all(is_running(pid) for pid in workers)
    server.kill()
    wait_until(lambda: not any(is_running(pid) for pid in workers), timeout_s=10.0)
