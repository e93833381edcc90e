"""The manifest of a checkpoint: one JSON file that says what it is, of which model, and what every file must be."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from megatron_keye.checkpoint.files import FileRecord
from megatron_keye.config.json_file import read_json_object
from megatron_keye.errors import CheckpointError
from megatron_keye.model.names import Piece

FORMAT = 2
MANIFEST = "manifest.json"
WEIGHT = "weight"
"""Keys of tensors are `KIND/NAME`: the kind is this, or the optimizer's own name of a moment (`exp_avg`, `exp_avg_sq`)."""

Identity = Mapping[str, int | float | str]
"""What makes two models the same: settings of the model by name, and the tokenizer's fingerprint."""


@dataclass(frozen=True)
class RunRecord:
    """Where the run stood. Texts belong to whoever wrote them and come back unchanged."""

    step: int
    """Steps committed so far."""
    resume_state: str
    settings: str
    """The run's settings as YAML."""
    ledger: str
    """The chain of the ledger's last line before it, hexadecimal."""
    versions: dict[str, str]


@dataclass(frozen=True)
class TensorRecord:
    """A stored canonical tensor: its whole shape, and the numbers of the files that hold rectangles of it."""

    shape: tuple[int, ...]
    dtype: str
    files: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    run: RunRecord
    model: dict[str, int | float | str]
    tensors: dict[str, TensorRecord]
    """By key."""
    steps: dict[str, int]
    """Updates that the moments of a tensor have seen, by name. Frozen and never-updated tensors are not in it."""
    files: tuple[FileRecord, ...]

    def to_json(self) -> str:
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({"sha256": _digest(content), **content}, indent=1) + "\n"


@dataclass(frozen=True)
class PartRecord:
    """What one rank wrote of one tensor."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    step: int | None
    """Of a weight with moments: its updates so far."""


def merge(run: RunRecord, identity: Identity, ranks: Iterable[tuple[FileRecord, list[PartRecord]]]) -> Manifest:
    """One manifest of what all ranks wrote.

    Raises CheckpointError where the parts of a tensor disagree or do not add up to it; that would be a fault of this program.
    """
    files, tensors, numels, steps = [], {}, {}, {}
    problems = []
    for number, (file, parts) in enumerate(ranks):
        files.append(file)
        for part in parts:
            known = tensors.setdefault(part.key, TensorRecord(part.shape, part.dtype, ()))
            numels[part.key] = numels.get(part.key, 0) + part.numel
            name = part.key.split("/", 1)[1]
            if (known.shape, known.dtype) != (part.shape, part.dtype) or (part.step and steps.setdefault(name, part.step) != part.step):
                problems.append(f"{part.key}: rank {number} has another shape, type or step than the ranks before it")
            if number not in known.files:
                tensors[part.key] = TensorRecord(known.shape, known.dtype, (*known.files, number))
    for key, tensor in tensors.items():
        if numels[key] != prod(tensor.shape):
            problems.append(f"{key}: the ranks wrote {numels[key]} of {prod(tensor.shape)} elements")
    if problems:
        raise CheckpointError("The parts of this save do not fit together; please report it:\n" + _bullets(problems))
    return Manifest(run, dict(identity), tensors, steps, tuple(files))


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError where the checkpoint or its manifest is missing, damaged, or of another format."""
    file = path / MANIFEST
    remedy = "choose a complete checkpoint"
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; expected a checkpoint: {remedy}")
    content = read_json_object(file, remedy)
    if content.pop("sha256", None) != _digest(content):
        raise CheckpointError(f"{file} does not have the checksum it was written with: it is damaged; {remedy}")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {content['format']}; this version reads {FORMAT}: use the version that wrote it")
    tensors = {
        key: TensorRecord(tuple(t["shape"]), t["dtype"], tuple(t["files"])) for key, t in content["tensors"].items()
    }  # fmt: skip
    files = tuple(FileRecord(**record) for record in content["files"])
    for record in files:
        if Path(record.name).name != record.name:
            raise CheckpointError(f"{file} names the file {record.name!r} outside of its folder: {remedy}")
    return Manifest(RunRecord(**content["run"]), content["model"], tensors, content["steps"], files)


def require_same_model(path: Path, manifest: Manifest, identity: Identity, pieces: Iterable[Piece]) -> None:
    """Raises CheckpointError with every difference between the stored model and the one to be filled."""
    problems = [*identity_problems(manifest.model, identity), *_tensor_problems(manifest, pieces)]
    if problems:
        raise CheckpointError(
            f"{path} is a checkpoint of another model:\n{_bullets(problems)}\nUse its own settings, or another checkpoint."
        )


def identity_problems(saved: Identity, own: Identity) -> list[str]:
    """Sentences about every entry in which two identities differ."""
    return [
        f"{name} is {own.get(name, 'absent')!r} here, {saved.get(name, 'absent')!r} in the checkpoint"
        for name in sorted({*saved, *own})
        if saved.get(name) != own.get(name)
    ]


def _tensor_problems(manifest: Manifest, pieces: Iterable[Piece]) -> list[str]:
    problems = {}
    for piece in pieces:
        stored = manifest.tensors.get(f"{WEIGHT}/{piece.name}")
        if stored is None:
            problems[piece.name] = f"{piece.name} is not in the checkpoint"
        elif stored.shape != piece.full_shape:
            problems[piece.name] = f"{piece.name} is {list(piece.full_shape)} here, {list(stored.shape)} in the checkpoint"
    return list(problems.values())


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _bullets(problems: list[str]) -> str:
    return "\n".join(f"  - {problem}" for problem in problems)
