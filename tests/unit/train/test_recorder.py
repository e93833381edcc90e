"""What a step's record says, and what somebody who watches reads."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.data.sources import MediaCounts
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.ledger import Skipped
from megatron_keye.plan.step import PlanData
from megatron_keye.train import recorder as recorder_module
from megatron_keye.train.feed import FedStep
from megatron_keye.train.placement import Planner
from megatron_keye.train.recorder import COUNTS, PHASES, PREDICTED, Recorder, StepRecord
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.step import StepResult

SHAPES = [SampleShape(40), SampleShape(70, (Segment(PatchGrid(1, 6, 8), 5),)), SampleShape(300), SampleShape(100)]


class FakeGroup:
    def size(self):
        return 2


class FakeLedger:
    """Writes its arguments."""

    def __init__(self, path):
        self.path = path

    def step(self, plan, after, skipped, updated):
        with self.path.open("a") as file:
            file.write(json.dumps([plan.step, after.step, [s.id for s in skipped], updated]) + "\n")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the recorder of a run with two ranks. The other one needs a second longer for every phase, has three times the decoder's
    load, encodes nothing, and is no leader."""

    def all_gather(every, mine, group):
        every[0].copy_(mine)
        phases = mine[: len(PHASES)] + 1.0
        decoder_load = 3 * mine[len(PHASES)]
        every[1].copy_(torch.tensor([*phases, decoder_load, math.nan, *[0.0] * len((*PREDICTED, *COUNTS))]))

    monkeypatch.setattr(recorder_module.dist, "all_gather", all_gather)
    run = RunDir(tmp_path)
    run.create()

    def make(config, first_step=0, is_main=True):
        groups = SimpleNamespace(world=FakeGroup(), is_leader=True, replica_rank=0, grid=SimpleNamespace(replica_size=2))
        runtime = SimpleNamespace(groups=groups, device=torch.device("cpu"), is_main=is_main)
        return run, Recorder(run, runtime, Planner(config, 1), FakeLedger(run.ledger) if is_main else None, first_step, 10)

    return make


def record_of(config, step=4, skipped=(), grad_norm=2.0, updated=True):
    plan, _ = Planner(config, 1).over(PlanData.of(SHAPES))(Cursor(step, 3 * step))
    after = Cursor(step + 1, 15, bytes(range(32)))
    media = MediaCounts(remote=5, failed=step)
    fed = FedStep(plan, plan.replicas[0], after, SimpleNamespace(num_supervised=33), [], 0.5, 10**6, step * 10**5, media)
    result = StepResult(1.25, grad_norm, updated, {"encode": 1.0, "decoder": 3.0, "encode_backward": 2.0})
    return StepRecord(fed, list(skipped), result, lr=0.001, step_time_s=4.0, dataset_samples=60)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_counted(tiny, make):
    config = tiny.config()
    run, recorder = make(config)
    recorder.record(record_of(config))
    recorder.close()
    (fields,) = lines(run.metrics)
    assert {name: fields[name] for name in ("step", "loss", "grad_norm", "lr", "updated")} == {
        "step": 4, "loss": 1.25, "grad_norm": 2.0, "lr": 0.001, "updated": True,
    }  # fmt: skip
    counts = ("samples", "tokens", "visual_tokens", "supervised_tokens", "padding_tokens", "skipped_samples")
    # Padding: to multiples of 16 tokens, and nothing more, as no row is empty.
    assert [fields[name] for name in counts] == [4, 510, 12, 33, 8 + 10 + 4 + 12, 0]
    assert fields["tokens_per_s"] == pytest.approx(510 / 4.0, abs=0.05)
    assert fields["epoch"] == 15 / 60
    assert [fields[f"{phase}_s"] for phase in PHASES] == [1.0, 1.5, 0.5, 3.5, 2.5, 0.5, 0.5], "means over both ranks"
    assert fields["decoder_imbalance_measured"] == pytest.approx(4 / 3.5, abs=1e-4)
    assert fields["vision_imbalance_measured"] == pytest.approx(5 / 4, abs=1e-4)
    assert (fields["decoder_imbalance_predicted"], fields["vision_imbalance_predicted"]) == (1.5, 1.0)
    assert fields["memory_bytes"] > 1 << 20
    assert [fields[f"media_{name}"] for name in ("remote", "local", "failed", "hedged")] == [5, 0, 4, 0]


def test_what_loading_took_is_shown_beside_what_it_would_take_on_every_rank(tiny, make, capsys):
    run, recorder = make(tiny.config())
    for step in (2, 4, 3):
        recorder.record(record_of(tiny.config(), step))
    recorder.close()
    assert [(fields["bytes_read"], fields["loader_bytes"]) for fields in lines(run.metrics)] == [
        (10**6, 2 * 10**5), (10**6, 4 * 10**5), (10**6, 3 * 10**5),
    ]  # fmt: skip
    assert (
        "loading: 3.0 MB read, at most 0.4 MB held decoded, by one of 2 ranks each; "
        "loading on every rank would take 6.0 MB and 0.8 MB"
    ) in capsys.readouterr().err


def test_the_ledger_gets_the_step_and_what_was_left_out(tiny, make, capsys):
    run, recorder = make(tiny.config())
    recorder.record(record_of(tiny.config(), skipped=[Skipped(sample=1, id="p7", source="web", reason="cut off")]))
    recorder.close()
    assert lines(run.ledger) == [[4, 5, ["p7"], True]]
    assert lines(run.metrics)[0]["skipped_samples"] == 1
    assert "step 5: left out p7: cut off" in capsys.readouterr().err


def test_a_step_without_an_update_says_why(tiny, make, capsys):
    run, recorder = make(tiny.config())
    recorder.record(record_of(tiny.config(), grad_norm=math.nan, updated=False))
    recorder.close()
    assert lines(run.metrics)[0]["grad_norm"] is None
    assert lines(run.ledger)[0][-1] is False
    assert "step 5: the gradient is not finite, so no weight was changed" in capsys.readouterr().err


def test_a_resumed_run_writes_its_steps_once(tiny, make):
    config = tiny.config()
    run, recorder = make(config)
    for step in range(4):
        recorder.record(record_of(config, step))
        recorder.validated(step + 1, float(step))
    recorder.close()
    run, recorder = make(config, first_step=2)
    for step in range(2, 5):
        recorder.record(record_of(config, step))
    # The validation after the last step before the restart is repeated too when the run was killed in it.
    recorder.validated(2, 7.0)
    recorder.close()
    assert [line["step"] for line in lines(run.metrics)] == [0, 1, 2, 3, 4]
    assert lines(run.validation) == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 7.0}]


def test_only_the_main_rank_writes_and_speaks(tiny, make, capsys):
    run, recorder = make(tiny.config(), is_main=False)
    recorder.record(record_of(tiny.config()))
    recorder.say("hello")
    recorder.validated(1, 1.0)
    recorder.close()
    assert not run.metrics.exists() and not run.ledger.exists() and not run.validation.exists() and not run.tensorboard.exists()
    assert capsys.readouterr().err == ""


def test_a_log_gets_a_line_now_and_then_and_at_the_end(tiny, make, monkeypatch, capsys):
    config = tiny.config()
    _, recorder = make(config)
    now = iter([0.0, 0.0, 1.0, 16.0, 16.0, 17.0, 18.0, 18.0])
    monkeypatch.setattr(recorder_module.time, "monotonic", lambda: next(now))
    for step in (0, 1, 2, 3, 9):
        recorder.record(record_of(config, step))
    recorder.close()
    said = [line.split("  ")[0].split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["step 1/10", "step 3/10", "step 10/10", "loading"]
