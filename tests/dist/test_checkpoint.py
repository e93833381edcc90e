"""A run that is saved at one layout and goes on at another, against one process that was never disturbed."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_keye.checkpoint.identity import identity
from megatron_keye.checkpoint.load import load_checkpoint, load_weights
from megatron_keye.checkpoint.manifest import RunRecord, read_manifest
from megatron_keye.checkpoint.state import LocalParameter, TrainingState
from megatron_keye.checkpoint.store import Keep, checkpoints, find_damage, save_checkpoint
from megatron_keye.config.load import load_config
from megatron_keye.config.schema import RunConfig
from megatron_keye.errors import CheckpointError
from megatron_keye.model.init import initial_tensor, proof_tensor
from megatron_keye.model.names import encoder_pieces
from megatron_keye.parallel.groups import build_groups, prepare_megatron
from megatron_keye.parallel.launch import run_ranks
from megatron_keye.train import build, checkpointing
from megatron_keye.train.build import build_model, build_optimizer
from megatron_keye.train.layouts import parse_layout
from megatron_keye.train.placement import rank_grid
from megatron_keye.train.step import TrainStep
from megatron_keye.train.synthetic import proof_shapes, synthetic_batch, synthetic_plan
from megatron_keye.train.verify import (
    FLOAT64_TOLERANCE,
    complete_weights,
    gather_gradients,
    gather_pieces,
    module_differences,
    prepare_rank,
    proof_config,
)

TOKENIZER = "fingerprint"
SMALL_BUCKET = 20000
"""Elements of a gradient bucket: the debug decoder gets tens of them."""


@dataclass(frozen=True)
class Outcome:
    """One step on from the checkpoint; complete on rank 0."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    fresh_moments: tuple[str, ...] = ()


def settings(layout: str, precision: str = "fp64", freeze: tuple[str, ...] = (), buckets: bool = False) -> RunConfig:
    """The debug model with a vocabulary that no layout divides; `buckets` also overlaps all communication."""
    config = proof_config(parse_layout(layout).apply(load_config("debug")), precision)
    decoder = config.model.decoder.model_copy(update={"vocab_size": 1021})
    model = config.model.model_copy(update={"decoder": decoder, "freeze": freeze})
    train = config.train.model_copy(update={"overlap_grad_reduce": buckets, "overlap_param_gather": buckets})
    return config.model_copy(update={"model": model, "train": train})


def run(layout: str, function, *args, **changes):
    config = settings(layout, **changes)
    prepare = partial(prepare_rank, config.train.precision == "fp64")
    return run_ranks(parse_layout(layout).world_size, function, config, *args, prepare=prepare)[0]


class Run:
    """A training run on this rank."""

    def __init__(self, config: RunConfig, draw):
        self.config = config
        self.num_replicas = dist.get_world_size() // rank_grid(config, 1).world_size
        self.groups = build_groups(rank_grid(config, self.num_replicas))
        prepare_megatron(self.groups, config.train.seed)
        ddp_config = partial(build.DistributedDataParallelConfig, bucket_size=SMALL_BUCKET if config.train.overlap_grad_reduce else None)
        with patch.object(build, "DistributedDataParallelConfig", ddp_config):
            self.model = build_model(config, self.groups, torch.device("cpu"), draw=draw)
        self.optimizer = build_optimizer(self.model)
        self.step = TrainStep(self.model, self.optimizer)

    def advance(self, number: int) -> Outcome:
        shapes = proof_shapes(self.config.model.variant)
        replicas = synthetic_plan(shapes[number % len(shapes)], self.config, self.num_replicas)
        batch = synthetic_batch(number, replicas, self.config, self.groups, torch.device("cpu"))
        loss = self.step.accumulate(batch)
        gradients = gather_gradients(self.model)
        norm, _ = self.step.update(1.0, batch.num_supervised)
        complete_weights(self.model)
        return Outcome(loss, norm, gradients, gather_pieces(self.model.pieces(), self.groups))

    def save(self, folder: Path, step: int) -> Path:
        record = RunRecord(step, f"cursor {step}", "settings", "ledger", {})
        state = checkpointing.training_state(self.model, self.optimizer)
        return save_checkpoint(folder, state, record, identity(self.config.model, TOKENIZER), Keep(2))


def start_run(config: RunConfig, folder: Path | None) -> Outcome:
    """Two steps, a save where a folder is given, and the third step."""
    run = Run(config, proof_tensor)
    for number in (0, 1):
        run.advance(number)
    if folder is not None:
        run.save(folder, 2)
    return run.advance(2)


def go_on(config: RunConfig, folder: Path, save_again: Path | None = None) -> Outcome | tuple[Outcome, Outcome]:
    """Other weights, replaced by the checkpoint's, and the step after it; with `save_again`, a save and one more step."""
    run = Run(config, initial_tensor)
    loaded = checkpointing.resume(folder, run.model, run.optimizer, TOKENIZER)
    assert loaded.run.resume_state == f"cursor {loaded.run.step}"
    outcome = run.advance(loaded.run.step)
    outcome = Outcome(outcome.loss, outcome.grad_norm, outcome.gradients, outcome.weights, loaded.fresh_moments)
    if save_again is None:
        return outcome
    run.save(save_again, loaded.run.step + 1)
    return outcome, run.advance(loaded.run.step + 1)


def worst_difference(a: Outcome, b: Outcome) -> float:
    modules = [*module_differences(a.gradients, b.gradients).values(), *module_differences(a.weights, b.weights).values()]
    return max(abs(a.loss - b.loss) / b.loss, abs(a.grad_norm - b.grad_norm) / b.grad_norm, *modules)


def is_bitwise_equal(a: Outcome, b: Outcome) -> bool:
    tensors = [(mine[name], theirs[name]) for mine, theirs in ((a.gradients, b.gradients), (a.weights, b.weights)) for name in theirs]
    return (a.loss, a.grad_norm) == (b.loss, b.grad_norm) and all(torch.equal(mine, theirs) for mine, theirs in tensors)


MATRIX = ("tp2", "pp2", "cp2", "dp2", "pp2vp2", "tp2pp2")
"""Layouts that save and load, each pair of them."""
BUCKETS = ("dp2",)
"""Layouts that save with many overlapping buckets."""


@pytest.fixture(scope="module")
def undisturbed() -> Outcome:
    return run("one", start_run, None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], tuple[Path, Outcome]]:
    """Per layout: the folder with its checkpoint, and the step that the same processes made afterwards. Made once, when asked for."""

    @cache
    def save_at(layout: str) -> tuple[Path, Outcome]:
        folder = tmp_path_factory.mktemp(layout)
        return folder, run(layout, start_run, folder, buckets=layout in BUCKETS)

    return save_at


@pytest.mark.parametrize(
    ("saving", "loading", "buckets"),
    [
        ("tp2sp", "one", False),
        ("one", "pp2", False),
        ("one", "tp2", False),
        ("tp2sp", "cp2", False),
        ("pp2vp2", "tp2pp2", False),
        ("dp2", "pp2vp2", False),
        ("pp2vp2", "dp2", True),
        ("dp2", "tp2sp", False),
    ],
)
def test_the_run_goes_on_at_another_layout(saved, undisturbed, saving, loading, buckets):
    folder, after_saving = saved(saving)
    assert worst_difference(after_saving, undisturbed) < FLOAT64_TOLERANCE, "saving changed the run"
    outcome = run(loading, go_on, folder, buckets=buckets)
    assert worst_difference(outcome, undisturbed) < FLOAT64_TOLERANCE
    assert outcome.fresh_moments == ()


@pytest.mark.slow
@pytest.mark.parametrize("loading", MATRIX)
@pytest.mark.parametrize("saving", MATRIX)
def test_any_layout_goes_on_from_any(saved, undisturbed, saving, loading):
    outcome = run(loading, go_on, saved(saving)[0])
    assert worst_difference(outcome, undisturbed) < FLOAT64_TOLERANCE
    assert outcome.fresh_moments == ()


@pytest.mark.parametrize("layout", ["one", "tp2sp", "dp2", "pp2vp2"])
def test_the_same_layout_goes_on_bit_for_bit(saved, layout):
    folder, after_saving = saved(layout)
    assert is_bitwise_equal(run(layout, go_on, folder, buckets=layout in BUCKETS), after_saving)


def test_bf16_with_float32_main_weights_goes_on_bit_for_bit(tmp_path):
    after_saving = run("dp2", start_run, tmp_path, precision="bf16", buckets=True)
    assert is_bitwise_equal(run("dp2", go_on, tmp_path, precision="bf16", buckets=True), after_saving)
    stored = {key: record.dtype for key, record in read_manifest(checkpoints(tmp_path)[-1]).tensors.items()}
    assert stored["weight/model.norm.weight"] == stored["exp_avg/model.norm.weight"] == "F32"
    assert stored["weight/visual.vision_model.head.probe"] == "BF16", "carried and never trained: stored as it is"


def test_a_module_that_was_frozen_starts_its_moments_from_zero(tmp_path):
    """Stage 1 trains without the ViT, stage 2 with it; moments of both ages then travel to another layout."""
    run("tp2", start_run, tmp_path / "first", freeze=("vision", "embedding"))
    thawed, later = run("dp2", go_on, tmp_path / "first", tmp_path / "second")
    assert "visual.vision_model.embeddings.patch_embedding.weight" in thawed.fresh_moments
    assert "model.embed_tokens.weight" in thawed.fresh_moments
    assert not [name for name in thawed.fresh_moments if not name.startswith(("visual.", "model.embed_tokens."))]
    steps = read_manifest(checkpoints(tmp_path / "second")[-1]).steps
    assert steps["model.embed_tokens.weight"] == 1
    assert steps["lm_head.weight"] == 3
    again = run("one", go_on, tmp_path / "second")
    assert again.fresh_moments == ()
    assert worst_difference(again, later) < FLOAT64_TOLERANCE
    frozen = run("pp2", go_on, tmp_path / "second", freeze=("vision", "projector", "decoder"))
    assert frozen.loss == pytest.approx(later.loss, rel=FLOAT64_TOLERANCE)


def weights_alone(config: RunConfig, path: Path) -> dict[str, Tensor]:
    run = Run(config, initial_tensor)
    load_weights(path, run.model.pieces())
    return gather_pieces(run.model.pieces(), run.groups)


def all_weights(config: RunConfig, folder: Path) -> dict[str, Tensor]:
    run = Run(config, initial_tensor)
    checkpointing.resume(folder, run.model, run.optimizer, TOKENIZER)
    return gather_pieces(run.model.pieces(), run.groups)


def test_weights_alone_are_those_of_the_whole_state(saved):
    folder, _ = saved("pp2vp2")
    expected = run("one", all_weights, folder)
    for layout in ("one", "tp2"):
        found = run(layout, weights_alone, checkpoints(folder)[-1])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def refuse(config: RunConfig, folder: Path) -> str:
    run = Run(config, initial_tensor)
    with pytest.raises(CheckpointError) as error:
        checkpointing.resume(folder, run.model, run.optimizer, "another")
    return str(error.value)


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(saved):
    folder, _ = saved("one")
    config = settings("tp2")
    decoder = config.model.decoder.model_copy(update={"ffn_hidden_size": 256, "norm_eps": 1e-5})
    config = config.model_copy(update={"model": config.model.model_copy(update={"decoder": decoder})})
    messages = run_ranks(2, refuse, config, folder, prepare=partial(prepare_rank, True))
    assert messages[0] == messages[1]
    for said in ("decoder.ffn_hidden_size is 256 here, 384", "decoder.norm_eps is 1e-05", "tokenizer is 'another'", "[256, 128] here"):
        assert said in messages[0]


def frozen_state(numel: int) -> TrainingState:
    """One float32 parameter that both ranks hold whole and of which each saves half."""
    parameter = nn.Parameter(torch.arange(numel, dtype=torch.int32).view(torch.float32), requires_grad=False)
    pieces = tuple(encoder_pieces({"visual.x": torch.empty(parameter.shape, device="meta")}))
    local = LocalParameter(parameter, pieces, dist.get_rank(), dist.get_world_size(), saves_whole=True)
    return TrainingState((local,), (), (), dist.group.WORLD)


def fail_on_rank_1(folder: Path) -> tuple[str, float]:
    """Rank 1 cannot write; what rank 0 sees, and how soon."""
    state = frozen_state(1000)
    record = RunRecord(1, "", "", "", {})
    save_checkpoint(folder, state, record, {}, keep=Keep(1))
    start = time.monotonic()
    disk_full = OSError(28, "No space left on device")
    broken = patch("megatron_keye.checkpoint.store.write_tensors", side_effect=disk_full) if dist.get_rank() else patch("time.ctime")
    with broken, pytest.raises(CheckpointError) as error:
        save_checkpoint(folder, state, RunRecord(2, "", "", "", {}), {}, keep=Keep(1))
    elapsed_s = time.monotonic() - start
    if dist.get_rank() == 1:
        broken = patch("megatron_keye.checkpoint.load.TensorFile", side_effect=OSError(5, "Input/output error"))
    with broken, pytest.raises(CheckpointError, match="rank 1: OSError.*Input/output error"):
        load_checkpoint(checkpoints(folder)[-1], state, {})
    return str(error.value), elapsed_s


def test_one_rank_that_fails_is_an_error_on_all_and_no_hang(tmp_path):
    for message, elapsed_s in run_ranks(2, fail_on_rank_1, tmp_path, prepare=lambda: None, timeout_s=30):
        assert "rank 1: OSError: [Errno 28] No space left on device" in message
        assert elapsed_s < 5
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert find_damage(tmp_path / "step_00000001") == []


class PeakMemory(threading.Thread):
    """Largest private memory of this process while it runs, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.001):
            self.peak = max(self.peak, private_bytes())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.join()


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def measure_memory(folder: Path, shard_bytes: int) -> tuple[float, float]:
    """Peak memory of saving and of loading beyond what the state itself takes, as a part of the rank's own shard."""
    state = frozen_state(2 * shard_bytes // 4)
    expected = state.parameters[0].parameter.view(torch.int32).clone()
    before = private_bytes()
    with PeakMemory() as saving:
        path = save_checkpoint(folder, state, RunRecord(1, "", "", "", {}), {}, keep=Keep(1))
    state.parameters[0].parameter.zero_()
    with PeakMemory() as loading:
        load_checkpoint(path, state, {})
    assert torch.equal(state.parameters[0].parameter.view(torch.int32), expected)
    return (saving.peak - before) / shard_bytes, (loading.peak - before) / shard_bytes


def test_saving_and_loading_need_little_memory_beyond_the_state(tmp_path):
    for saving, loading in run_ranks(2, measure_memory, tmp_path, 128 << 20, prepare=lambda: None):
        assert saving < 0.5
        assert loading < 0.5
