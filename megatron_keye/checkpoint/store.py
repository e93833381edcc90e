"""Save a checkpoint, whole or not at all, and find the newest good one.

A checkpoint is a folder `step_00000123` of one safetensors file per rank and a manifest. Each rank writes only what it
owns, as rectangles of canonical tensors, so no rank gathers anything and any layout can read it. It is written under a
hidden name, flushed to disk, and becomes visible by one rename.

Why not Megatron's `dist_checkpointing`: 0.16.1 can store irregular rectangles (read, not run), but through torch's distributed
checkpoint, whose `.metadata` is a pickle that is executed on reading; it exchanges the metadata of every piece between all
ranks, starts a helper process per rank, and knows neither checksums nor a commit. JSON and safetensors need neither pickle
nor helper, and every tool can read them.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import ProcessGroup

from megatron_keye.checkpoint.collective import exchange, gather, on_first_rank, rank_of, size_of, together
from megatron_keye.checkpoint.files import DTYPE_NAMES, FileRecord, OnBytes, file_damage, flush_folder, write_tensors, write_text
from megatron_keye.checkpoint.manifest import MANIFEST, Identity, Manifest, PartRecord, RunRecord, merge, read_manifest
from megatron_keye.checkpoint.state import SavedPart, TrainingState, part_key, saved_parts
from megatron_keye.errors import CheckpointError

_VISIBLE = re.compile(r"step_(\d{8,})(?:_(\d+))?")
_HIDDEN = re.compile(r"\.step_\d{8,}(?:_\d+)?\.(?:incomplete|removed)")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a new one is there."""

    newest: int
    """So many, the new one included; at least 1."""
    every_steps: int = 0
    """Those of steps that are multiples of it stay for good; 0 is none."""

    def superseded(self, older_steps: list[int]) -> list[int]:
        """Of checkpoints older than the new one, in ascending order, the numbers (from 0) of those to remove."""
        surplus = max(0, len(older_steps) + 1 - self.newest)
        return [number for number, step in enumerate(older_steps[:surplus]) if not self.every_steps or step % self.every_steps]


def save_checkpoint(folder: Path, state: TrainingState, run: RunRecord, identity: Identity, keep: Keep) -> Path:
    """Save `state` as a new checkpoint in `folder`, then remove those that `keep` does not keep. All ranks must call it.

    Returns the checkpoint's folder. A step that was saved before is saved again beside it, as `step_00000123_1`, and
    replaces it. Later steps, which a run leaves behind when it goes back, stay until it reaches them again. Host memory used
    beyond the state itself: a chunk of 1 MiB.
    Raises CheckpointError on all ranks, leaving earlier checkpoints as they were, when any rank could not save.
    """
    unfinished = UnfinishedCheckpoint(folder, run, identity, keep, state.world)
    return unfinished.commit(lambda: unfinished.write(list(saved_parts(state))))


Written = tuple[FileRecord, list[PartRecord]]


class UnfinishedCheckpoint:
    """A checkpoint that has no name yet. All ranks of `world` make one together."""

    def __init__(self, folder: Path, run: RunRecord, identity: Identity, keep: Keep, world: ProcessGroup | None):
        """Raises CheckpointError on all ranks where `folder` cannot be written to."""
        self._run, self._identity, self._keep, self._world = run, identity, keep, world
        with self._remedy(folder):
            self._incomplete = on_first_rank(world, lambda: _start(folder, run.step))

    def write(self, parts: list[SavedPart]) -> Written:
        """Write this rank's file. No collective: any thread may call it."""
        return _write_parts(self._incomplete, rank_of(self._world), parts)

    def commit(self, written: Callable[[], Written]) -> Path:
        """Give the checkpoint its name, and return its folder. All ranks must call it.

        `written` gives what `write` returned on this rank, or raises as it did; then CheckpointError is raised on all ranks, and earlier
        checkpoints stay as they were.
        """
        with self._remedy(self._incomplete.parent):
            try:
                ranks = gather(self._world, together(self._world, written))
                return on_first_rank(self._world, lambda: _commit(self._incomplete, merge(self._run, self._identity, ranks), self._keep))
            except CheckpointError:
                if rank_of(self._world) == 0:
                    shutil.rmtree(self._incomplete, ignore_errors=True)
                raise

    @contextmanager
    def _remedy(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(
                f"Step {self._run.step} could not be saved in {folder}; earlier checkpoints there are untouched. "
                f"Make room or repair the folder, and resume.\n{error}"
            ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Every committed checkpoint in `folder`, oldest first; their files are not looked at."""
    return [path for _, path in sorted((_place(path), path) for path in _visible(folder))]


def latest(folder: Path) -> Path | None:
    """The newest committed checkpoint, good or damaged."""
    return next(reversed(checkpoints(folder)), None)


def latest_good(folder: Path, world: ProcessGroup | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and what is wrong with newer ones that were passed over.

    Reads every byte of the ones it looks at, shared between the ranks of `world`, all of which must call it and get the same.
    """
    passed_over = []
    for path in reversed(on_first_rank(world, lambda: checkpoints(folder))):
        damage = find_damage(path, world)
        if not damage:
            return path, passed_over
        passed_over += damage
    return None, passed_over


def find_damage(path: Path, world: ProcessGroup | None = None, on_bytes: OnBytes = lambda num_bytes: None) -> list[str]:
    """Everything that is wrong with the files of a checkpoint, the same on all ranks of `world`; empty for a good one.

    Reads every byte, shared between the ranks. `on_bytes` is told the bytes that this rank has read.
    """
    own = _own_damage(path, rank_of(world), size_of(world), on_bytes)
    return list(dict.fromkeys(problem for problems in exchange(world, own) for problem in problems))


def _own_damage(path: Path, rank: int, num_ranks: int, on_bytes: OnBytes) -> list[str]:
    """Damage of the manifest and of every `num_ranks`-th file."""
    try:
        files = read_manifest(path).files
    except CheckpointError as error:
        return [str(error)]
    found = (file_damage(path, record, on_bytes) for record in files[rank::num_ranks])
    return [problem for problem in found if problem is not None]


def _start(folder: Path, step: int) -> Path:
    """Make room for a new checkpoint; what crashed saves and removals left behind goes first."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _HIDDEN.fullmatch(path.name):
            shutil.rmtree(path)
    incomplete = folder / f".step_{step:08d}.incomplete"
    incomplete.mkdir()
    return incomplete


def _write_parts(folder: Path, rank: int, parts: list[SavedPart]) -> Written:
    tensors = [(part_key(part.kind, part.name, part.rectangle), part.data) for part in parts]
    file = write_tensors(folder / f"rank_{rank:05d}.safetensors", tensors)
    return file, [
        PartRecord(f"{part.kind}/{part.name}", part.full_shape, DTYPE_NAMES[part.data.dtype], part.rectangle.numel, part.step)
        for part in parts
    ]


def _commit(incomplete: Path, manifest: Manifest, keep: Keep) -> Path:
    write_text(incomplete / MANIFEST, manifest.to_json())
    flush_folder(incomplete)
    folder = incomplete.parent
    same_step = [path for path in checkpoints(folder) if _place(path)[0] == manifest.run.step]
    attempt = f"_{_place(same_step[-1])[1] + 1}" if same_step else ""
    committed = folder / f"step_{manifest.run.step:08d}{attempt}"
    incomplete.rename(committed)
    flush_folder(folder)
    older = [path for path in checkpoints(folder) if _place(path)[0] < manifest.run.step]
    for path in (*same_step, *(older[number] for number in keep.superseded([_place(path)[0] for path in older]))):
        _remove(path)
    return committed


def _remove(path: Path) -> None:
    """Out of sight first, so that a crash while files go leaves nothing that looks like a damaged checkpoint."""
    hidden = path.with_name(f".{path.name}.removed")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _visible(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if _VISIBLE.fullmatch(path.name))


def _place(path: Path) -> tuple[int, int]:
    """(step, attempt): the order of checkpoints."""
    step, attempt = _VISIBLE.fullmatch(path.name).groups()
    return int(step), int(attempt or 0)
