"""A rank of a run that is watched: it trains with the program's own code, and shows on the board what it is at.

File operations of a save take FILE_PAUSE_S longer, and those of a save in the background BACKGROUND_PAUSE_S, without which a save of
this small model would be over before anybody can strike between two of them.
"""

import json
import os
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

from megatron_keye.checkpoint.background import WRITING_THREAD
from megatron_keye.checkpoint.manifest import MANIFEST
from megatron_keye.config.schema import RunConfig
from megatron_keye.data.loader import ReplicaData, ReplicaLoader
from megatron_keye.data.mixture import MixedDataset
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.mixture import Mixture
from megatron_keye.plan.types import ReplicaPlan
from megatron_keye.train.feed import Feed
from megatron_keye.train.loop import Training
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.runtime import Runtime
from megatron_keye.train.step import StepResult, TrainStep
from tests.chaos.board import Board, Place
from tests.chaos.schedule import Phase
from tests.tiny import runtime_here

FILE_PAUSE_S = 0.004
BACKGROUND_PAUSE_S = 0.3
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
"""What Python's audit hooks call the operations of a save."""
PHASE_OF_BEAT: dict[str, Phase] = {"setup": "setup", "load": "restore", "step": "load", "save": "save"}
WITNESS = "witness.jsonl"


class WatchedStep(TrainStep):
    """Says which phase of a step it is in."""

    def __init__(self, model, optimizer, place: Place):
        super().__init__(model, optimizer)
        self._place = place

    def run(self, batch, lr_factor: float) -> StepResult:
        self._place.enter("encode")
        result = super().run(batch, lr_factor)
        self._place.enter("record")
        return result

    def _decode(self, batch, leaves, forward_only: bool):
        self._place.enter("decoder")
        return super()._decode(batch, leaves, forward_only)

    def _encode_backward(self, batch, leaves) -> None:
        self._place.enter("encode_backward")
        super()._encode_backward(batch, leaves)

    def update(self, lr_factor: float, num_supervised: int) -> tuple[float, bool]:
        self._place.enter("optimizer")
        return super().update(lr_factor, num_supervised)


class WatchedFeed(Feed):
    """Writes down what really stands in a step, not what the plan says: one line {"step", "crc32": {sample: of its tokens and pixels}}
    per replica. `newest` is the cursor after the last step that was prepared."""

    def __init__(self, witness: Path, place: Place, *feed_arguments):
        self._witness, self._place = witness, place
        self.newest: Cursor | None = None
        super().__init__(*feed_arguments)

    def _prepare(self, plan, share: ReplicaPlan, after: Cursor):
        prepared = super()._prepare(plan, share, after)
        self.newest = after
        if prepared.data is not None:
            self._place.has_read(self._loader.counts.samples)
            line = json.dumps({"step": plan.step, "crc32": contents(share, prepared.data)})
            # A line that a full disk cuts off must not spoil the next; the run itself has to notice such a disk.
            with suppress(OSError), self._witness.open("a") as file:
                file.write(f"\n{line}\n")
        return prepared


def contents(share: ReplicaPlan, data: ReplicaData) -> dict[int, int]:
    """CRC-32 of the tokens, supervision and pixels in the place of each sample."""
    segments: dict[tuple[int, int], dict[int, bytes]] = {}
    rounds = {key: iter(patches) for key, patches in data.patches.items()}
    for task in share.tasks:
        patches = next(rounds[task.encoder, task.round])
        segments.setdefault((task.microbatch, task.document), {})[task.segment] = patches.tobytes()
    found = {}
    for row_number, (row, tokens) in enumerate(zip(share.rows, data.rows, strict=True)):
        for number, document in enumerate(row.documents):
            own = slice(document.start, document.start + document.shape.num_tokens)
            parts = [tokens.token_ids[own].tobytes(), tokens.supervised[own].tobytes()]
            pixels = segments.get((row_number, number), {})
            found[document.sample] = zlib.crc32(b"".join([*parts, *(pixels[segment] for segment in sorted(pixels))]))
    return found


class WatchedTraining(Training):
    """One start of a run on this rank."""

    def __init__(self, config: RunConfig, run_dir: RunDir, runtime: Runtime, place: Place):
        self._place = place
        super().__init__(config, run_dir, runtime)
        self.step = WatchedStep(self.model, self.step.optimizer, place)
        sys.addaudithook(self._on_file_operation)

    def _beat(self, step: int, phase: str) -> None:
        super()._beat(step, phase)
        self._place.finished(step)
        if phase == "save":
            # Either one is about to be committed, or the next to begin.
            self._place.is_writing(False)
        self._place.enter(PHASE_OF_BEAT[phase])

    def _loader(self, dataset: MixedDataset) -> ReplicaLoader | None:
        return None if self._loading is None else self._loading.loader(dataset)

    def _feed(self, dataset: MixedDataset, cursor: Cursor, mixture: Mixture) -> WatchedFeed:
        self._place.begin(cursor.step)
        plan_at = self.planner.over(dataset.plan_data, mixture.order())
        arguments = (self.config, self.runtime.groups, plan_at, self._loader(dataset), self._transport, cursor, self.runtime.device)
        return WatchedFeed(self.run_dir.path / WITNESS, self._place, *arguments)

    def _on_file_operation(self, event: str, arguments: tuple) -> None:
        if event not in FILE_EVENTS:
            return
        if threading.current_thread().name == WRITING_THREAD:
            self._place.is_writing(True)
            time.sleep(BACKGROUND_PAUSE_S)
            return
        if self._place.phase not in ("save", "rename"):
            return
        if event == "open" and str(arguments[0]).endswith(f".incomplete/{MANIFEST}"):
            self._place.enter("rename")
        time.sleep(FILE_PAUSE_S)


def train_watched(config: RunConfig, path: Path, board: Board, kind: type[WatchedTraining]) -> None:
    """What every rank of a life does."""
    run_dir = RunDir(path)
    run_dir.create()
    runtime = runtime_here(config)
    place = board.place(runtime.groups.rank)
    place.arrive(os.getpid(), runtime.groups.is_leader)
    kind(config, run_dir, runtime, place).run()
