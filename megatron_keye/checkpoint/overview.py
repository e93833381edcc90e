"""What there is to say about checkpoints from their manifests and the sizes of their files, without reading tensors."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_keye.checkpoint.files import DTYPES, size_damage
from megatron_keye.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megatron_keye.checkpoint.store import checkpoints
from megatron_keye.config.strict_yaml import parse_yaml
from megatron_keye.errors import CheckpointError
from megatron_keye.model.modules import MODULES, module_of


@dataclass(frozen=True)
class Overview:
    """A line of a list of checkpoints."""

    path: Path
    saved_at_s: float
    """Seconds since 1970."""
    manifest: Manifest | None
    """None where it is damaged."""
    problems: tuple[str, ...]
    """Of the manifest and of the files' sizes. Bytes that have changed are found by `store.find_damage` alone."""

    @property
    def num_bytes(self) -> int:
        return 0 if self.manifest is None else sum(file.num_bytes for file in self.manifest.files)

    @property
    def layout(self) -> str:
        return "" if self.manifest is None else saved_layout(self.manifest)


def checkpoints_at(path: Path) -> list[Path]:
    """`path` itself where it is a checkpoint, else those of a run directory or of a folder of checkpoints, oldest first.

    Raises CheckpointError where there is none.
    """
    if (path / MANIFEST).is_file() or re.fullmatch(r"step_\d+(_\d+)?", path.name):
        return [path]
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint: expected one (with {MANIFEST}), a run directory, or a folder of checkpoints")
    return found


def overview(path: Path) -> Overview:
    """Never raises for a damaged checkpoint: its problems say so."""
    saved_at_s = path.stat().st_mtime if path.exists() else 0.0
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Overview(path, saved_at_s, None, (str(error),))
    problems = (size_damage(path, record) for record in manifest.files)
    return Overview(path, saved_at_s, manifest, tuple(problem for problem in problems if problem is not None))


def saved_layout(manifest: Manifest) -> str:
    """`tp2 pp2, 8 ranks` as the settings say; empty for a checkpoint that no run has saved."""
    settings = parse_yaml(manifest.run.settings)
    sizes = settings.get("parallel") if isinstance(settings, Mapping) else None
    if sizes is None:
        return ""
    above_one = [f"{name}{sizes[name]}" for name in ("tp", "cp", "pp", "vp") if sizes.get(name, 1) > 1]
    ranks = len(manifest.files)
    return f"{' '.join(above_one) or 'tp1'}, {ranks} {'rank' if ranks == 1 else 'ranks'}"


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one module, kind (weight, exp_avg, exp_avg_sq) and type."""

    module: str
    kind: str
    dtype: str
    num_tensors: int
    num_bytes: int


def tensor_groups(manifest: Manifest) -> list[TensorGroup]:
    """By module, in the order of the model."""
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for key, record in manifest.tensors.items():
        kind, name = key.split("/", 1)
        group = (module_of(name), kind, record.dtype)
        counts[group] += 1
        sizes[group] += prod(record.shape) * DTYPES[record.dtype].itemsize
    return [TensorGroup(*group, counts[group], sizes[group]) for group in sorted(counts, key=_order)]


def _order(group: tuple[str, str, str]) -> tuple:
    module, kind, dtype = group
    return MODULES.index(module), kind != "weight", kind, dtype
