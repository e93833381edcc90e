"""The file of measured times: what `keye calibrate` writes and `data.cost_file` names. JSON, with a digest of its content.

It holds for one model, layout and precision: every setting that times depend on is in it by name, and a run with other ones is refused.
"""

import hashlib
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from pydantic import Field, ValidationError
from torch.distributed import ProcessGroup

from megatron_keye.config.explain import all_settings, value_of
from megatron_keye.config.json_file import read_json_object
from megatron_keye.config.schema import NonNegative, Positive, RunConfig, Section
from megatron_keye.errors import SettingsError
from megatron_keye.plan.timing import Coefficients, TimeModel
from megatron_keye.train.run_dir import write_atomically

FORMAT = 1
COSTS, FLOPS = "costs", "FLOPs"
"""Name under which a checkpoint says what placement went by, and the word for costs that were not measured."""
_TIMED = ("model.", "parallel.", "kernels.", "encode.activations", "train.precision")
_UNTIMED = ("model.init_std",)


class PartCoefficients(Section):
    """Picoseconds per unit of work, see `plan/timing.py`."""

    token_ps: NonNegative
    pair_ps: NonNegative
    item_ps: NonNegative
    sequence_ps: NonNegative


class PartTimes(Section):
    """One part of a step: what was fitted, and how far |predicted / measured - 1| is from 0."""

    coefficients: PartCoefficients
    error_p95: float = Field(ge=0.0)
    error_max: float = Field(ge=0.0)
    measurements: tuple[tuple[int, int, int, int, float], ...]
    """(tokens, pairs, items, sequences, median seconds) of each."""


class Parts(Section):
    vision_forward: PartTimes
    vision_backward: PartTimes
    decoder: PartTimes
    decoder_forward: PartTimes


class Machine(Section):
    """Where it was measured."""

    host: str
    device: str
    """`cpu`, or the GPU's name."""
    processes: Positive


class Calibration(Section):
    """The whole content of a file."""

    format: Literal[1] = FORMAT
    version: str
    """Of megatron_keye."""
    date: str
    machine: Machine
    settings: dict[str, Any]
    """Those that times depend on, by dotted name."""
    parts: Parts

    @property
    def digest(self) -> str:
        """SHA-256 of the content, hexadecimal."""
        return _digest(self.model_dump(mode="json"))

    @property
    def time_model(self) -> TimeModel:
        coefficients = {name: Coefficients(**part["coefficients"]) for name, part in self.parts.model_dump().items()}
        return TimeModel(**coefficients)


def timed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that times depend on, by dotted name, as JSON has them."""
    names = [setting.name for setting in all_settings() if setting.name.startswith(_TIMED) and setting.name not in _UNTIMED]
    return json.loads(json.dumps({name: value_of(config, name) for name in names}))


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Raises SettingsError where the file cannot be written."""
    content = {**calibration.model_dump(mode="json"), "sha256": calibration.digest}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}; name another file with --output") from error


def open_calibration(config: RunConfig) -> Calibration | None:
    """The measured times that a run's placement goes by; None where `data.cost_file` names none.

    Raises SettingsError where the file is missing or damaged, or of another model or layout.
    """
    if config.data.cost_file is None:
        return None
    path = Path(config.data.cost_file)
    calibration = load_calibration(path)
    then, now = calibration.settings, timed_settings(config)
    changed = [
        f"{name} is {now.get(name)!r} here, {then.get(name)!r} in the file" for name in {**now, **then} if now.get(name) != then.get(name)
    ]
    if changed:
        raise SettingsError(f"{path} was measured with other settings: {'; '.join(changed)}. {_AGAIN}")
    return calibration


def load_calibration(path: Path) -> Calibration:
    """Raises SettingsError for a file that is missing, damaged, changed by hand, or of another format."""
    content = read_json_object(path, "make it with `keye calibrate`, or remove data.cost_file", SettingsError)
    written = content.pop("sha256", None)
    try:
        calibration = Calibration.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise SettingsError([f"{path}: {_describe(problem)}. {_AGAIN}" for problem in error.errors()]) from error
    if written != calibration.digest:
        raise SettingsError(f"{path} does not have the digest it was written with: it was changed or is damaged. {_AGAIN}")
    return calibration


def require_same_device(calibration: Calibration | None, device_type: str) -> None:
    """Raises SettingsError where times of a CPU would place samples for GPUs, or the other way round."""
    if calibration is not None and (calibration.machine.device == "cpu") != (device_type == "cpu"):
        raise SettingsError(f"data.cost_file was measured on {calibration.machine.device}, and this run is on {device_type}. {_AGAIN}")


def costs_version(calibration: Calibration | None) -> str:
    """What placement goes by, in a word: the digest of measured times, or FLOPs."""
    return FLOPS if calibration is None else calibration.digest


def require_same_everywhere(calibration: Calibration | None, world: ProcessGroup) -> None:
    """Raises SettingsError, on every rank, where ranks have read different times."""
    digests: list = [None] * world.size()
    dist.all_gather_object(digests, costs_version(calibration), group=world)
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise SettingsError(
            f"data.cost_file has another content on ranks {others} ({digests[others[0]][:12]}) than on rank 0 ({digests[0][:12]}); "
            "give all hosts the same file"
        )


_AGAIN = "Run `keye calibrate` again with these settings, or remove data.cost_file"


def _describe(problem: Any) -> str:
    """One of pydantic's errors: the name, what was found, and the nearest name that there is."""
    *parents, name = problem["loc"]
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(str(name), _names(parents), n=1, cutoff=0.0)
        return f"unknown name {place}: did you mean {near[0]}?"
    if problem["type"] == "missing":
        return f"{place} is missing"
    return f"{place} is {json.dumps(problem['input'])[:80]}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _names(parents: list) -> list[str]:
    """Names that the section at this place has."""
    section: type[Section] = Calibration
    for name in parents:
        section = section.model_fields[name].annotation
    return list(section.model_fields)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
