"""What `keye verify-layout` finds: one outcome per layout, and all of it as JSON."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_keye.config.derive import check
from megatron_keye.config.schema import RunConfig
from megatron_keye.errors import KeyeError, SettingsError
from megatron_keye.parallel.launch import WorkerError
from megatron_keye.train.layouts import Layout, parse_layout
from megatron_keye.train.verify import Difference, Tolerance, Trace, compare, tolerance, trace_layout


@dataclass(frozen=True)
class Outcome:
    """One layout's run beside the reference. Where its ranks failed there is an `error`, and no difference."""

    layout: Layout
    seconds: float
    trace: Trace | None
    difference: Difference | None
    error: str | None

    def is_within(self, limit: Tolerance) -> bool:
        return self.difference is not None and limit.holds(self.difference)


@dataclass(frozen=True)
class Reference:
    """The one-process run, and the differences to it that count as none."""

    trace: Trace
    seconds: float
    limit: Tolerance


def check_layouts(config: RunConfig, layouts: Sequence[Layout]) -> None:
    """Raises SettingsError with every layout that the settings or this machine cannot run."""
    problems = [f"{layout.name}: {problem}" for layout in layouts for problem in check(layout.apply(config), layout.world_size)]
    num_gpus = torch.cuda.device_count()
    if num_gpus and config.train.precision != "bf16":
        problems.append(
            f"{config.train.precision} is compared with float64 or is float64, which Megatron's optimizer refuses on a GPU: "
            "hide the GPUs (CUDA_VISIBLE_DEVICES= keye verify-layout ...) to run on CPU, or use --dtype bf16"
        )
    problems += [
        f"{layout.name} has {layout.world_size} ranks and this machine {num_gpus} GPU(s): NCCL refuses two ranks on one GPU. "
        "Name smaller layouts with --layouts, or hide the GPUs (CUDA_VISIBLE_DEVICES= keye verify-layout ...) to run on CPU"
        for layout in layouts
        if 0 < num_gpus < layout.world_size
    ]
    if problems:
        raise SettingsError(problems)


def run_reference(config: RunConfig) -> Reference:
    """Run the proof on one process, and find the limit. Raises KeyeError where that fails."""
    started = time.monotonic()
    try:
        trace = trace_layout(config, parse_layout("one"))
        seconds = time.monotonic() - started
        return Reference(trace, seconds, tolerance(config, trace))
    except WorkerError as error:
        raise KeyeError(f"The reference on one process failed, so there is nothing to compare with: {error}") from error


def run_layouts(config: RunConfig, layouts: Sequence[Layout], reference: Reference) -> Iterator[Outcome]:
    """Run and compare one layout after another."""
    for layout in layouts:
        started = time.monotonic()
        try:
            trace = trace_layout(config, layout)
        except WorkerError as error:
            yield Outcome(layout, time.monotonic() - started, None, None, first_error(str(error)))
            continue
        yield Outcome(layout, time.monotonic() - started, trace, compare(trace, reference.trace), None)


def first_error(text: str) -> str:
    """The line that names the exception in a failed rank's report: the first one after the frames of its first traceback."""
    heading, *traceback = text.splitlines()
    frames = ("Traceback", " ")
    return next((line for line in traceback if line and not line.startswith(frames)), heading)


def worst_module(differences: dict[str, float]) -> tuple[str, float]:
    return max(differences.items(), key=lambda item: item[1])


def as_json(config: RunConfig, reference: Reference, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything found, as plain data; differences that are not finite (missing or NaN) are null."""
    return {
        "precision": config.train.precision,
        "variant": config.model.variant,
        "limit": asdict(reference.limit),
        "ok": all(outcome.is_within(reference.limit) for outcome in outcomes),
        "reference": {"seconds": reference.seconds, **_numbers(reference.trace)},
        "layouts": [_outcome_fields(outcome, reference.limit) for outcome in outcomes],
    }


def _outcome_fields(outcome: Outcome, limit: Tolerance) -> dict[str, Any]:
    fields = {
        "layout": outcome.layout.name,
        "ranks": outcome.layout.world_size,
        "seconds": outcome.seconds,
        "ok": outcome.is_within(limit),
        "error": outcome.error,
    }
    if outcome.difference is not None:
        difference = outcome.difference
        fields["difference"] = {
            "loss": _finite(difference.loss),
            "grad_norm": _finite(difference.grad_norm),
            "gradients": {module: _finite(value) for module, value in difference.gradients.items()},
            "weights": {module: _finite(value) for module, value in difference.weights.items()},
        }
        fields |= _numbers(outcome.trace)
    return fields


def _numbers(trace: Trace) -> dict[str, list[float | None]]:
    return {"losses": [_finite(x) for x in trace.losses], "grad_norms": [_finite(x) for x in trace.grad_norms]}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
