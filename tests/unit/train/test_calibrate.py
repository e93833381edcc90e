"""Calibrating the tiny model: every part of every designed step is measured once a rank, and the file holds for the run."""

from types import SimpleNamespace

import pytest
import torch

from megatron_keye.config.load import dump_config, load_config
from megatron_keye.plan.cost import cost_model
from megatron_keye.plan.timing import PARTS, Work, row_work, vision_work
from megatron_keye.train.calibrate import FEWEST_ROUNDS, BenchPlace, Measurement, calibration_of, measure, rank_measurements
from megatron_keye.train.calibration import load_calibration, open_calibration
from megatron_keye.train.calibration_design import designed_replica, designed_steps
from tests.tiny import on_ranks, runtime_here, with_layout
from tests.unit.train.forked import keye

SIZE = ("data.seq_length_tokens=128",)
RUNTIME = SimpleNamespace(device=torch.device("cpu"), groups=SimpleNamespace(world=SimpleNamespace(size=lambda: 3)))
"""What `calibration_of` reads of a runtime."""


def calibrate_rank(config, num_steps):
    steps = designed_steps(config)
    steps = steps[:: len(steps) // num_steps]
    runtime, told = runtime_here(config), []
    found = measure(config, runtime, steps, 0.0, told.append)
    return steps, found, told, calibration_of(found, config, runtime)


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "dp2"])
def test_all_parts_of_all_steps_are_measured(tiny, layout):
    config = with_layout(tiny.config(*SIZE), layout)
    results = on_ranks(layout, config, calibrate_rank, 4)
    steps, found, told, calibration = results[0]
    assert told == list(range(1, FEWEST_ROUNDS * len(steps) + 1)), "a budget of nothing ends after the first counted round"
    assert all(other[1] == found for other in results), "every rank has all measurements"
    plans = [designed_replica(step.samples, config, cost_model(config.model)) for step in steps]
    replicas = 2 if layout == "dp2" else 1
    rows = sorted(row_work(plan.rows[0]) for plan in plans for _ in range(replicas))
    by_rank = [vision_work(plan, rank) for plan in plans * replicas for rank in range(len(results) // replicas)]
    encoded = sorted(work for work in by_rank if work.items)
    assert encoded
    for part in PARTS:
        measured = [m.work for m in found if m.part == part]
        assert sorted(measured) == (encoded if part.startswith("vision") else rows), part
    assert all(m.seconds > 0 for m in found)
    assert calibration.machine.processes == len(results)


ROUNDS = [
    {"vision_forward": 90.0, "vision_backward": 90.0, "decoder": 90.0, "decoder_forward": 90.0},
    {"vision_forward": 3.0, "vision_backward": 7.0, "decoder": 12.0, "decoder_forward": 6.0},
    {"vision_forward": 1.0, "vision_backward": 9.0, "decoder": 60.0, "decoder_forward": 3.0},
    {"vision_forward": 2.0, "vision_backward": 8.0, "decoder": 6.0, "decoder_forward": 30.0},
]


@pytest.mark.parametrize(("stages", "chunks", "decoder_s"), [(1, 1, 12.0), (2, 1, 12.0 / 3), (2, 2, 12.0 / 2.5), (4, 1, 12.0 / 7)])
def test_times_are_medians_after_the_warm_up_and_the_decoder_s_are_per_row(stages, chunks, decoder_s):
    """A pipeline runs its m rows, one for each stage here, and waits for (stages - 1) / chunks more."""
    config = load_config("debug", [f"parallel.pp={stages}"])
    image = next(step for step in designed_steps(config) if step.name.startswith("1 image"))
    replica = designed_replica(image.samples, config, cost_model(config.model))
    found = {m.part: m.seconds for m in rank_measurements("x", replica, ROUNDS, BenchPlace(0, stages, chunks, trains_encoder=True))}
    assert found == pytest.approx({"vision_forward": 2.0, "vision_backward": 8.0, "decoder": decoder_s, "decoder_forward": decoder_s / 2})
    elsewhere = rank_measurements("x", replica, ROUNDS, BenchPlace(stages, stages, chunks, trains_encoder=True))
    assert elsewhere == [], "a rank that encoded nothing and leads nobody"


def test_a_frozen_vit_has_no_backward_pass(tiny):
    config = tiny.config(*SIZE, "model.freeze=[vision,projector]")
    _, found, _, calibration = on_ranks("one", config, calibrate_rank, 4)[0]
    assert {m.part for m in found} == set(PARTS) - {"vision_backward"}
    assert calibration.time_model.vision == calibration.time_model.vision_forward


def test_what_known_times_say_is_found(tiny):
    config = tiny.config()
    works = [Work(k * n, k * n * n, k, s) for k in (1, 5, 20) for n in (16, 128, 1024) for s in (1, 3)]
    exact = [
        Measurement("", part, work, 1e-6 * work.tokens + 1e-9 * work.pairs + 1e-3 * work.sequences) for part in PARTS for work in works
    ]
    calibration = calibration_of(exact, config, RUNTIME)
    for part in PARTS:
        times = getattr(calibration.parts, part)
        assert times.error_max < 1e-3
        assert len(times.measurements) == len(works)
    assert calibration.time_model.vision.token_ps == pytest.approx(2e6, rel=1e-3)
    assert calibration.time_model.decoder.pair_ps == pytest.approx(1e3, rel=1e-2)


def test_the_command_writes_a_file_that_the_run_takes(tiny, tmp_path):
    path, picture, settings = tmp_path / "tiny.json", tmp_path / "tiny.svg", tmp_path / "tiny.yaml"
    config = tiny.config(*SIZE)
    settings.write_text(dump_config(config))
    code, text = keye("calibrate", settings, "-o", path, "--seconds", "0", "--plot", picture)
    assert code == 0, text
    assert "set data.cost_file=" in text
    assert picture.read_text().startswith("<?xml")
    opened = open_calibration(tiny.config(*SIZE, f"data.cost_file={path}"))
    assert opened == load_calibration(path)


def test_a_dry_run_starts_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = keye("calibrate", "debug", "--dry-run", "--set", "parallel.pp=2")
    assert code == 0
    assert text.startswith("2 processes: tp 1 x cp 1 x pp 2; 28 kinds of rows")
    assert "1 image(s) of 256 tokens: 272 tokens, 1,024 patches" in text
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_hold_replicas_are_refused(tmp_path):
    code, text = keye("calibrate", "debug", "--dry-run", "-n", "3", "--set", "parallel.pp=2")
    assert code == 65
    assert "start a multiple of 2 processes" in text
