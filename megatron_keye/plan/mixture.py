"""What an order follows from: sources, their weights, and the positions at which weights changed. A few numbers, kept with the cursor.

Samples are numbered one source after another. A source keeps its place in its own order whatever the weights do, and new sources come
after those that are there, so neither changes what earlier positions mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_keye.errors import PlanError
from megatron_keye.plan.blend import Blend, BlendedOrder
from megatron_keye.plan.blocks import BlockOrder


@dataclass(frozen=True, slots=True)
class Source:
    """One data set of a mixture. `fingerprint` changes with its samples; `block_samples` lie side by side in its order."""

    name: str
    fingerprint: str
    num_samples: int
    block_samples: int


@dataclass(frozen=True, slots=True)
class Stage:
    """From `position` on, sources are mixed by `weights` (of `blend.CYCLE`), each from its place `starts[source]` on."""

    position: int
    weights: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mixture:
    """All that an order follows from."""

    seed: int
    blocks_per_window: int
    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]

    def order(self) -> BlendedOrder:
        """The endless order of all samples. Raises PlanError for a mixture that gives none."""
        orders = [
            BlockOrder(source.num_samples, source.block_samples, self.blocks_per_window, self.seed + number)
            for number, source in enumerate(self.sources)
        ]
        return BlendedOrder(orders, [(stage.position, self._blend(stage)) for stage in self.stages])

    def epochs(self, order: BlendedOrder, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: how often the source of each position was gone through before it; `order` is this mixture's."""
        sources, places = order.places(positions)
        return places // np.array([source.num_samples for source in self.sources])[sources]

    def with_weights(self, weights: Sequence[int], frontier: int) -> "Mixture":
        """The mixture that has `weights` from position `frontier` on, and before it what it had."""
        if tuple(weights) == self.stages[-1].weights:
            return self
        kept = tuple(stage for stage in self.stages if stage.position < frontier)
        if not kept:
            return replace(self, stages=(Stage(frontier, tuple(weights), self.stages[0].starts),))
        starts = self._blend(kept[-1]).used(frontier - kept[-1].position)
        return replace(self, stages=(*kept, Stage(frontier, tuple(weights), starts)))

    def since(self, position: int) -> "Mixture":
        """The same order from `position` on, without the stages that ended before it."""
        current = max(number for number, stage in enumerate(self.stages) if stage.position <= position)
        return replace(self, stages=self.stages[current:])

    def _blend(self, stage: Stage) -> Blend:
        """Sources that came later than the stage have no part in it."""
        missing = (0,) * (len(self.sources) - len(stage.weights))
        return Blend(stage.weights + missing, stage.starts + missing, self.seed)


def fresh_mixture(sources: Sequence[Source], weights: Sequence[int], seed: int, blocks_per_window: int) -> Mixture:
    """The mixture of a run that begins."""
    return Mixture(seed, blocks_per_window, tuple(sources), (Stage(0, tuple(weights), (0,) * len(sources)),))


def continued(saved: Mixture, wanted: Mixture, frontier: int) -> Mixture:
    """The order of a run that went by `saved` and goes on with what is `wanted` now: at `frontier`, the first position that no window
    has drawn, weights may change and sources may be added. Raises PlanError, with every problem, where it cannot."""
    problems = list(_differences(saved, wanted))
    if problems:
        raise PlanError("\n".join(problems))
    return replace(saved, sources=wanted.sources).with_weights(wanted.stages[0].weights, frontier)


def _differences(saved: Mixture, wanted: Mixture) -> Iterator[str]:
    if saved.seed != wanted.seed:
        yield f"seed is {wanted.seed}, but was {saved.seed}: set train.seed back"
    if saved.blocks_per_window != wanted.blocks_per_window:
        yield f"blocks_per_window is {wanted.blocks_per_window}, but was {saved.blocks_per_window}: set data.order.blocks_per_window back"
    names, now = [source.name for source in saved.sources], [source.name for source in wanted.sources]
    if now[: len(names)] != names:
        yield (
            f"the sources are {now}, but were {names}: keep these in this order, with repeats 0 for one that should not be used any more, "
            "and add new ones after them"
        )
        return
    for before, source in zip(saved.sources, wanted.sources, strict=False):
        if source.fingerprint != before.fingerprint:
            yield (
                f"source {source.name} has fingerprint {source.fingerprint:.12}, but had {before.fingerprint:.12}: its data or the rules "
                "it is read with changed; restore them"
            )
        elif source != before:
            yield (
                f"source {source.name} is cut into blocks of {source.block_samples} samples, but was of {before.block_samples}: set "
                "data.order.block_bytes back"
            )
