"""A tiny data set, a tiny model, and whole training runs of them on forked ranks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config.derive import num_replicas, require_valid
from megatron_keye.config.load import load_config
from megatron_keye.config.schema import RunConfig, VideoConfig
from megatron_keye.data.dataset import Dataset
from megatron_keye.data.indexing import index_folder, save_index
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.data.writing import plan_shards, write_shards
from megatron_keye.errors import KeyeError
from megatron_keye.parallel.groups import build_groups, prepare_megatron
from megatron_keye.parallel.launch import run_ranks
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.ledger import StepLine
from megatron_keye.train.layouts import parse_layout
from megatron_keye.train.ledger import read_ledger
from megatron_keye.train.loop import Training
from megatron_keye.train.placement import Planner, rank_grid
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.runtime import Runtime
from megatron_keye.train.verify import gather_pieces, prepare_rank
from tests.unit.data.conftest import write_tokenizer
from tests.unit.data.corpus import mp4, png

MODEL = (
    "model.vision.hidden_size=32", "model.vision.num_layers=2", "model.vision.num_heads=2", "model.vision.ffn_hidden_size=48",
    "model.decoder.hidden_size=64", "model.decoder.num_heads=4", "model.decoder.ffn_hidden_size=96",
)  # fmt: skip
SHARD_BYTES = 20_000


@dataclass(frozen=True)
class TinySet:
    """Folders `train` (24 samples), `valid` (6) and `tokenizer`; the records of both parts lie beside them as JSONL."""

    folder: Path

    def config(self, *overrides: str) -> RunConfig:
        """A run of 6 steps of 4 samples on the tiny model, in float32, unless overridden."""
        data = tuple(f"data.{part}={self.folder / part}" for part in ("train", "valid", "tokenizer"))
        steps = ("data.global_batch_samples=4", "data.pad_multiple_tokens=16", "data.seq_length_tokens=512", "train.steps=6")
        threads = ("data.loader.workers=0",)  # processes would take longer to start than these runs take
        often = ("train.save_every_steps=2", "train.valid_every_steps=0", "train.valid_steps=1", "optimizer.warmup_steps=2")
        return load_config("debug", (*MODEL, *data, *steps, *threads, *often, *overrides))

    def dataset(self, config: RunConfig) -> Dataset:
        return Dataset.open(config.data.train, load_tokenizer(self.folder / "tokenizer", "keye_vl_1_5"), "keye_vl_1_5", config.data)


def make_tiny_set(folder: Path) -> TinySet:
    """Pictures and clips of many sizes, chats and documents, written as any data set is."""
    write_tokenizer(folder / "tokenizer")
    (folder / "media").mkdir()
    for number, (height, width) in enumerate([(30, 60), (56, 56), (90, 170), (200, 140)]):
        (folder / "media" / f"{number}.png").write_bytes(png(height, width, number))
    for number, num_frames in enumerate([3, 16]):
        (folder / "media" / f"{number}.mp4").write_bytes(mp4(num_frames, 56, 84, fps=8, cut=num_frames // 2))
    write_part(folder, "train", [tiny_record(number) for number in range(24)])
    write_part(folder, "valid", [tiny_record(number) for number in range(24, 30)])
    return TinySet(folder)


def write_part(folder: Path, part: str, records: list[dict]) -> Path:
    """Shards and index of `records` in `folder / part`; media and tokenizer are those of `folder`."""
    source = folder / f"{part}.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    out, tokenizer = folder / part, folder / "tokenizer"
    write_shards(source, out, plan_shards(source, SHARD_BYTES))
    save_index(out, tokenizer, "keye_vl_1_5", VideoConfig(), index_folder(out, tokenizer, "keye_vl_1_5", VideoConfig()))
    return out


def tiny_record(number: int) -> dict:
    """In turn: a picture, a clip, text alone, two pictures, a document, a long text."""
    kind = number % 6
    picture, clip = image_part(number % 4), {"type": "video", "video": f"media/{number % 2}.mp4"}
    parts = {0: [picture], 1: [clip], 2: [], 3: [picture, image_part((number + 1) % 4)], 4: [picture], 5: []}[kind]
    text = {"type": "text", "text": f"how many squares? {number} " * (30 if kind == 5 else 1)}
    head = {"id": f"t{number}", "task": "text" if kind in (2, 5) else "look"}
    if kind == 4:
        return head | {"document": [text, *parts]}
    answer = f"{number} squares"
    messages = [{"role": "user", "content": [*parts, text]}, {"role": "assistant", "content": answer}]
    return head | {"answer": answer, "messages": messages}


def image_part(number: int) -> dict:
    return {"type": "image", "image": f"media/{number}.png"}


def with_layout(config: RunConfig, layout: str) -> RunConfig:
    return parse_layout(layout).apply(config)


def on_ranks(layout: str, config: RunConfig, function: Callable, *args, timeout_s: float = 120.0) -> list:
    """The results of function(config, *args) on the forked ranks of `layout`, by rank; `config` gets that layout."""
    config, world_size = with_layout(config, layout), parse_layout(layout).world_size
    require_valid(config, world_size)
    prepare = partial(prepare_rank, config.train.precision == "fp64")
    return run_ranks(world_size, function, config, *args, prepare=prepare, timeout_s=timeout_s)


def runtime_here(config: RunConfig) -> Runtime:
    """The runtime of this forked rank."""
    groups = build_groups(rank_grid(config, num_replicas(config, dist.get_world_size())))
    prepare_megatron(groups, config.train.seed)
    return Runtime(groups, torch.device("cpu"))


Hook = Callable[[Training, str, int], None]
"""Called with the run, the phase (load, step, save, eval) and the number of finished steps."""


class HookedTraining(Training):
    """A run that calls `hook` at every heartbeat in the loop."""

    def __init__(self, config: RunConfig, run_dir: RunDir, runtime: Runtime, hook: Hook):
        self.hook = hook
        super().__init__(config, run_dir, runtime)

    def _heartbeat(self, cursor, phase: str) -> None:
        super()._heartbeat(cursor, phase)
        self.hook(self, phase, cursor.step)


def no_hook(training: Training, phase: str, step: int) -> None:
    pass


def train(layout: str, config: RunConfig, path: Path, hook: Hook = no_hook) -> dict[str, Tensor]:
    """One start of a run until it ends by itself; the weights it ends with, by canonical name."""
    return on_ranks(layout, config, _train_rank, path, hook)[0]


def _train_rank(config: RunConfig, path: Path, hook: Hook) -> dict[str, Tensor]:
    run_dir = RunDir(path)
    run_dir.create()
    training = HookedTraining(config, run_dir, runtime_here(config), hook)
    training.run()
    return gather_pieces(training.model.pieces(), training.runtime.groups)


def run_as(config, kind, path, hook):
    """One start of a run on this rank; how it ended: (name, exit code, message) of the error, or None."""
    run_dir = RunDir(path)
    run_dir.create()
    try:
        kind(config, run_dir, runtime_here(config), hook).run()
    except KeyeError as error:
        return type(error).__name__, error.exit_code, str(error)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def steps_of(path):
    """The step lines of a run's ledger."""
    return [line for line in read_ledger(RunDir(path).ledger) if isinstance(line, StepLine)]


def ask(name, step):
    """A hook that puts the file `name` there before the step after `step` steps."""

    def hook(training, phase, finished):
        if phase == "step" and finished == step:
            (training.run_dir.path / name).touch()

    return hook


def planned(dataset, config, steps):
    """The plans of a run's first steps."""
    plan_at, cursor, plans = Planner(config, num_replicas=1).over(dataset.plan_data), Cursor(), []
    for _ in range(steps):
        plan, cursor = plan_at(cursor)
        plans.append(plan)
    return plans


def losses(path: Path) -> dict[int, float]:
    """Loss by step, of a run directory."""
    lines = read_lines(RunDir(path).metrics)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return {line["step"]: line["loss"] for line in lines}
