"""`keye verify-layout`: its comparison, verdicts, exit codes and report, on made-up runs."""

import json
import math

import pytest
import torch

from megatron_keye.parallel.launch import WorkerError
from megatron_keye.train import cli, verify, verify_report
from megatron_keye.train.verify import EXACT, Difference, Trace, compare, module_differences, module_of, worst
from megatron_keye.train.verify_report import first_error

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight")


def trace(error=0.0, loss_error=0.0):
    tensors = {name: torch.linspace(-2.0, 4.0, 5, dtype=torch.float64) for name in NAMES}
    moved = tensors | {"lm_head.weight": tensors["lm_head.weight"] + error}
    return Trace([2.0 + loss_error, 1.0], [3.0, 3.0], [tensors, moved], moved)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("visual.vision_model.encoder.layers.12.self_attn.q_proj.bias", "visual.vision_model.encoder.layers.12"),
        ("lm_head.weight", "lm_head"),
        ("mlp_AR.pre_norm.bias", "mlp_AR.pre_norm"),
    ],
)
def test_modules_are_layers_or_single_layers_of_weights(name, module):
    assert module_of(name) == module


def test_differences_are_relative_to_the_largest_element_of_the_module():
    difference = compare(trace(error=1e-3, loss_error=1e-2), trace())
    assert difference.gradients == pytest.approx({"model.layers.0": 0.0, "lm_head": 1e-3 / 4})
    assert difference.weights == pytest.approx({"model.layers.0": 0.0, "lm_head": 1e-3 / 4})
    assert difference.loss == pytest.approx(5e-3)
    assert difference.grad_norm == 0.0


def test_missing_tensors_and_numbers_that_are_not_finite_differ_infinitely():
    whole = trace().weights
    assert math.isinf(worst(module_differences({"lm_head.weight": whole["lm_head.weight"]}, whole)))
    assert math.isinf(worst(module_differences(trace(error=torch.nan).weights, whole)))
    assert math.isinf(compare(trace(loss_error=math.nan), trace()).loss)


@pytest.mark.parametrize("too_large", ["loss", "grad_norm", "gradients", "weights"])
def test_every_kind_of_difference_counts(too_large):
    small = {"loss": 1e-11, "grad_norm": 1e-11, "gradients": {"a": 1e-11}, "weights": {"a": 1e-11}}
    assert EXACT.holds(Difference(**small))
    large = 2e-10 if too_large in ("loss", "grad_norm") else {"a": 1e-11, "b": 2e-10}
    assert not EXACT.holds(Difference(**small | {too_large: large}))


def test_first_error_is_the_exception_of_the_first_traceback():
    report = 'rank 1 of 2 failed:\nTraceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\nValueError: 3 is odd\nuse 4\n'
    assert first_error(report) == "ValueError: 3 is odd"
    assert first_error("ranks [1] did not end in time") == "ranks [1] did not end in time"


@pytest.fixture
def fake_runs(monkeypatch):
    """Makes a layout's run come from a table of traces and errors, by name; anything else equals one process."""
    table = {}

    def run(config, layout, reverse_rows=False):
        key = f"{config.train.precision} {layout.name}{' reversed' if reverse_rows else ''}"
        found = table.get(key, trace())
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(verify, "trace_layout", run)
    monkeypatch.setattr(verify_report, "trace_layout", run)
    monkeypatch.setattr(verify_report.torch.cuda, "device_count", lambda: 0)
    return table


def verify_layout(*argv):
    return cli.main(["verify-layout", "debug", *argv])


def test_all_usual_layouts_run_by_default(fake_runs, capsys):
    assert verify_layout() == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()[-1:] == ["ok"]]
    assert shown == ("tp2 pp2 cp2 dp2 tp2sp tp2pp2 tp2cp2 cp2pp2 tp2dp2 cp2dp2 pp2dp2 pp2vp2 tp2cp2sp dp2recompute".split())


def test_a_difference_and_a_failed_rank_are_rows_and_exit_code_1(fake_runs, capsys, tmp_path):
    fake_runs["fp64 cp2"] = trace(error=1e-9)
    fake_runs["fp64 pp2"] = WorkerError("rank 0 of 2 failed:\nTraceback (most recent call last):\n  x\nRuntimeError: [gone]\n")
    assert verify_layout("--layouts", "tp2", "cp2", "pp2", "dp2", "--json", str(tmp_path / "out.json")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [next(line for line in lines if name in line).split()[-1] for name in ("tp2", "cp2", "pp2", "dp2")] == [
        "ok",
        "FAIL",
        "FAIL",
        "ok",
    ]
    assert "pp2: RuntimeError: [gone]" in lines
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["ok"] is False
    assert report["settings"] == "debug"
    assert report["limit"] == {"numbers": 1e-10, "gradients": 1e-10, "weights": 1e-10}
    assert [(row["layout"], row["ranks"], row["ok"]) for row in report["layouts"]] == [
        ("tp2", 2, True), ("cp2", 2, False), ("pp2", 2, False), ("dp2", 2, True),
    ]  # fmt: skip
    assert report["layouts"][1]["difference"]["gradients"]["lm_head"] == pytest.approx(1e-9 / 4)
    assert report["layouts"][2]["error"] == "RuntimeError: [gone]"
    assert report["reference"]["losses"] == [2.0, 1.0]


def test_a_number_that_is_not_finite_is_null_in_the_report(fake_runs, tmp_path):
    fake_runs["fp64 tp2"] = trace(error=torch.nan, loss_error=math.inf)
    assert verify_layout("--layouts", "tp2", "--json", str(tmp_path / "out.json")) == 1
    (row,) = json.loads((tmp_path / "out.json").read_text())["layouts"]
    assert row["difference"]["loss"] is row["difference"]["weights"]["lm_head"] is row["losses"][0] is None


def test_other_precisions_tolerate_twice_their_own_rounding(fake_runs):
    fake_runs["bf16 one reversed"] = trace(error=1e-6, loss_error=4e-3)
    fake_runs["fp32 one"] = trace(error=1e-2)
    fake_runs["bf16 tp2"] = trace(error=1.9e-2, loss_error=7e-3)
    assert verify_layout("--layouts", "tp2", "--dtype", "bf16") == 0
    fake_runs["bf16 tp2"] = trace(error=2.1e-2)
    assert verify_layout("--layouts", "tp2", "--dtype", "bf16") == 1
    fake_runs["bf16 tp2"] = trace(loss_error=9e-3)
    assert verify_layout("--layouts", "tp2", "--dtype", "bf16") == 1


def test_a_reference_that_fails_is_an_error(fake_runs, capsys):
    fake_runs["fp64 one"] = WorkerError("rank 0 of 1 failed:\nRuntimeError: no")
    assert verify_layout() == 1
    assert "The reference on one process failed" in capsys.readouterr().err


def test_layouts_that_do_not_fit_are_refused_before_anything_runs(fake_runs, capsys):
    fake_runs["fp64 one"] = WorkerError("must not run")
    assert verify_layout("--layouts", "tp2", "tp3", "pp8") == 65
    errors = capsys.readouterr().err
    assert "tp3: model.decoder.num_kv_groups = 4 is not a multiple of parallel.tp = 3" in errors
    assert "pp8: model.decoder.num_layers = 4" in errors
    assert verify_layout("--layouts", "tp2x") == 65
    assert "cannot read 'x'" in capsys.readouterr().err


def test_too_few_gpus_are_refused_with_what_to_do(fake_runs, monkeypatch, capsys):
    monkeypatch.setattr(verify_report.torch.cuda, "device_count", lambda: 2)
    assert verify_layout("--layouts", "tp2", "tp2cp2", "--dtype", "bf16") == 65
    errors = capsys.readouterr().err
    assert "tp2cp2 has 4 ranks and this machine 2 GPU(s): NCCL refuses two ranks on one GPU" in errors
    assert "CUDA_VISIBLE_DEVICES=" in errors
    assert "tp2 has" not in errors
    assert verify_layout("--layouts", "tp2") == 65
    assert "which Megatron's optimizer refuses on a GPU" in capsys.readouterr().err
    assert verify_layout("--layouts", "tp2", "--dtype", "bf16") == 0
