"""The `keye` command and the launcher of local runs: what they print and the exit codes that launchers act on."""

import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from launch.run_ranks import exit_code
from megatron_keye.errors import DataError, NumericError
from megatron_keye.train import cli

ROOT = Path(__file__).resolve().parents[2]


def fake_command(monkeypatch, run) -> None:
    """Puts a subcommand `fake` in place whose `run` is the given function."""
    module = ModuleType(f"{cli.PACKAGE}.fake")
    module.HELP, module.EXAMPLES = "Fake help.", "  keye fake --number 3\n"
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int, default=0)
    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake", "a fake"))


def raising(error: Exception):
    def run(args):
        raise error

    return run


def test_help_shows_every_command_and_needs_no_torch():
    code = "import sys; from megatron_keye.train.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name, command in cli.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert command.summary in done.stdout


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_no_arguments_and_help_print_the_overview(argv, capsys):
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith("usage: keye COMMAND")


def test_the_commands_are_frozen():
    """A new command or a renamed one is a change that users see: change this list on purpose."""
    expected = "config train eval score checkpoint ledger remap calibrate io-server report verify-layout".split()
    assert list(cli.COMMANDS) == expected


def test_an_unknown_command_gets_the_nearest_one(capsys):
    assert cli.main(["trian"]) == 65
    assert "no command is called 'trian'" in (error := capsys.readouterr().err)
    assert "did you mean train?" in error


def test_an_unknown_argument_is_a_settings_error(capsys):
    assert cli.main(["config", "debug", "--bogus"]) == 65
    assert capsys.readouterr().err == "keye: error: unrecognized arguments: --bogus; `keye config --help` shows what is accepted\n"


def test_a_command_gets_its_arguments_and_gives_its_code(monkeypatch):
    fake_command(monkeypatch, lambda args: args.number)
    assert cli.main(["fake", "--number", "7"]) == 7


def test_help_of_a_command_shows_its_examples(monkeypatch, capsys):
    fake_command(monkeypatch, lambda args: 0)
    with pytest.raises(SystemExit) as caught:
        cli.main(["fake", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "Fake help." in out
    assert "keye fake --number 3" in out


@pytest.mark.parametrize(("error", "code"), [(DataError("shard 3 is cut off"), 65), (NumericError("loss is nan"), 66)])
def test_an_error_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code):
    fake_command(monkeypatch, raising(error))
    assert cli.main(["fake"]) == code
    assert capsys.readouterr().err == f"keye: error: {error}\n"


def test_under_a_launcher_the_rank_is_named(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["config", "no_such_recipe"]) == 65
    assert capsys.readouterr().err.startswith("keye [rank 3]: error: no recipe is called 'no_such_recipe'")


def test_a_bug_keeps_its_traceback(monkeypatch):
    fake_command(monkeypatch, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_a_command_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "future", cli.Command("future", "not yet"))
    assert cli.main(["future"]) == 1
    assert "keye future is not part of this version" in capsys.readouterr().err


def test_a_dependency_that_is_not_installed(monkeypatch, capsys):
    def import_module(name):
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    assert cli.main(["train", "debug"]) == 1
    assert "keye train needs the Python package 'torch'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_teaches_by_example(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert f"  keye {name}" in capsys.readouterr().out.partition("examples:")[2]


def test_config_lists_the_recipes(capsys):
    assert cli.main(["config"]) == 0
    assert "keye_vl_1_5_8b_annealing  " in capsys.readouterr().out


def test_config_prints_resolved_settings(capsys):
    assert cli.main(["config", "debug", "--set", "train.steps=7", "parallel.tp=2"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["train"]["steps"], settings["parallel"]["tp"]) == (7, 2)
    assert settings["optimizer"]["beta2"] == 0.95


def test_config_explains_every_setting(capsys):
    assert cli.main(["config", "debug", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "parallel.tp = 1  (int > 0)\n    Tensor-parallel ranks.\n" in out


def test_config_checks_the_layout(capsys):
    assert cli.main(["config", "debug", "--set", "parallel.tp=2", "--processes", "3"]) == 65
    assert "start a multiple of 2 processes" in capsys.readouterr().err
    assert cli.main(["config", "debug", "--set", "parallel.tp=2", "--processes", "4"]) == 0


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([65], 65),
        ([1, -signal.SIGTERM], 1),
        ([-signal.SIGTERM, 65], 65),
        ([1, 66, 65], 66),
        ([-signal.SIGTERM, -signal.SIGKILL], 137),
        ([-signal.SIGTERM, -signal.SIGTERM], 143),
    ],
)
def test_one_exit_code_for_all_ranks(codes, code):
    assert exit_code(codes) == code


@pytest.mark.parametrize(("behaviour", "code"), [("sys.exit(66 if rank == 1 else 0)", 66), ("os.kill(os.getpid(), 9)", 137), ("pass", 0)])
def test_run_ranks_ends_with_the_workers_code(tmp_path, behaviour, code):
    worker = tmp_path / "worker.py"
    worker.write_text(f"import os, sys\nrank = int(os.environ['RANK'])\n{behaviour}\n")
    command = [sys.executable, ROOT / "launch/run_ranks.py", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", worker]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == code


def local(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "launch/local.sh", *arguments], capture_output=True, text=True, check=False, timeout=60)


def test_local_teaches():
    done = local("--help")
    assert done.returncode == 0
    assert "launch/local.sh -n 2 debug --run-dir runs/debug" in done.stdout


def test_local_shows_what_it_would_do(tmp_path):
    done = local("-n", "2", "debug", "--dry-run", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0
    for part in (
        "layout: 2 processes",
        f"--nproc-per-node 2 -m megatron_keye.train.cli train debug --run-dir {tmp_path}/run ",
        "OMP_NUM_THREADS=",
    ):
        assert part in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a number of processes"),
        (["-n"], "-n needs a number"),
        (["-n", "two", "debug"], "found -n 'two'"),
        (["-n", "0", "debug"], "found -n '0'"),
        (["-n", "2"], "no settings given"),
    ],
)
def test_local_refuses_a_wrong_command_line(arguments, message):
    done = local(*arguments)
    assert done.returncode == 65
    assert message in done.stderr


def test_local_ends_with_the_trainers_exit_code():
    done = local("-n", "2", "no_such_recipe")
    assert done.returncode == 65
    assert "no recipe is called 'no_such_recipe'" in done.stderr


def test_the_smoke_test_explains_itself_and_wants_a_python(monkeypatch):
    script = ROOT / "launch/smoke_2gpu.sh"
    assert "usage: launch/smoke_2gpu.sh" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    monkeypatch.setenv("PYTHON", "/nonexistent/python")
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no Python at /nonexistent/python: run `make setup`" in done.stderr
