"""What an order follows from: sources, their weights, and the positions at which weights changed. A few numbers, kept with the cursor.

Samples are numbered one source after another. A source keeps its place in its own order whatever the weights do, and new sources come
after those that are there, so neither changes what earlier positions mean. Where the data of a source changed, `Mixture.remapped`
begins a new order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from megatron_keye.errors import PlanError
from megatron_keye.plan.blend import Blend, BlendedOrder
from megatron_keye.plan.blocks import BlockOrder
from megatron_keye.plan.order import Order
from megatron_keye.plan.remap import NO_REMAP, Due, Remap, RemappedOrder, nothing_due


@dataclass(frozen=True, slots=True)
class Source:
    """One data set of a mixture. `fingerprint` changes with its samples; `block_samples` lie side by side in its order."""

    name: str
    fingerprint: str
    num_samples: int
    block_samples: int
    remap: Annotated[Remap, Field(exclude_if=lambda remap: remap == NO_REMAP)] = NO_REMAP
    """How its order begins, where its data changed on the way."""

    def order(self, whole_epochs: Order, due: Due) -> Order:
        """Its own endless order, which goes by `whole_epochs` but for what a remap has due."""
        if self.remap == NO_REMAP:
            return whole_epochs
        samples = due(self.remap) if self.remap.counts else np.zeros(0, np.int64)
        return RemappedOrder(self.remap, samples, whole_epochs)

    def epochs(self, places: np.ndarray) -> np.ndarray:
        """int64 [n]: the epoch of each of `places` in its order."""
        return self.remap.epochs(places, self.num_samples)


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a source has come: windows were given the first `num_drawn` places of its order, and steps took all before `first_left`."""

    num_drawn: int
    first_left: int

    @property
    def is_open(self) -> bool:
        """Whether a window in progress has samples of it."""
        return self.first_left < self.num_drawn

    def epochs_in_progress(self, source: Source) -> range:
        """The epochs of which samples were used, but not all."""
        return range(int(source.epochs(np.array([self.first_left]))[0]), source.remap.epochs_begun(self.num_drawn, source.num_samples))


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

    def order(self, due: Due = nothing_due) -> BlendedOrder:
        """The endless order of all samples; `due` is asked where data changed. Raises PlanError for a mixture that gives none."""
        orders = [source.order(self.whole_epochs(number), due) for number, source in enumerate(self.sources)]
        return BlendedOrder(orders, [(stage.position, self._blend(stage)) for stage in self.stages])

    def whole_epochs(self, number: int) -> BlockOrder:
        """The order of a source, from its first epoch on, had its data never changed. Raises PlanError for a source that has none."""
        source = self.sources[number]
        return BlockOrder(source.num_samples, source.block_samples, self.blocks_per_window, self.seed + number)

    def epochs(self, order: BlendedOrder, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: how often the source of each position was gone through before it; `order` is this mixture's."""
        return self.sources_and_epochs(order, positions)[1]

    def sources_and_epochs(self, order: BlendedOrder, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position, and its epoch as by `epochs`: int64 [n] twice."""
        sources, places = order.places(positions)
        epochs = np.empty_like(places)
        for number in np.unique(sources).tolist():
            here = sources == number
            epochs[here] = self.sources[number].epochs(places[here])
        return sources, epochs

    def standings(self, order: BlendedOrder, frontier: int, left: Sequence[int]) -> list[Standing]:
        """Of each source, when windows have drawn the positions below `frontier`, of which steps have taken all but `left`."""
        sources, places = order.places(np.array(left, np.int64))
        return [
            Standing(num_drawn, int(places[sources == number].min(initial=num_drawn)))
            for number, num_drawn in enumerate(self._num_drawn(frontier))
        ]

    def with_weights(self, weights: Sequence[int], frontier: int) -> "Mixture":
        """The mixture that has `weights` from position `frontier` on, and before it what it had."""
        if tuple(weights) == self.stages[-1].weights:
            return self
        kept = tuple(stage for stage in self.stages if stage.position < frontier)
        if not kept:
            return replace(self, stages=(Stage(frontier, tuple(weights), self.stages[0].starts),))
        starts = self._blend(kept[-1]).used(frontier - kept[-1].position)
        return replace(self, stages=(*kept, Stage(frontier, tuple(weights), starts)))

    def remapped(self, sources: Sequence[Source], position: int, standings: Sequence[Standing]) -> "Mixture":
        """The mixture of `sources` that goes on when `position` samples were taken; `standings` are those of the sources then.

        Sources that are not what they were begin their new order, and so do all of which a window in progress had samples: it is given
        up. Positions from `position` on are those of the new mixture.
        """
        starts = tuple(
            0 if source != before or standing.is_open else standing.num_drawn
            for before, source, standing in zip(self.sources, sources, standings, strict=True)
        )
        weights = tuple(self._blend(self.stages[-1]).weights.tolist())
        return replace(self, sources=tuple(sources), stages=(Stage(position, weights, starts),))

    def since(self, position: int) -> "Mixture":
        """The same order from `position` on, without the stages that ended before it."""
        current = max(number for number, stage in enumerate(self.stages) if stage.position <= position)
        return replace(self, stages=self.stages[current:])

    def _num_drawn(self, frontier: int) -> tuple[int, ...]:
        """Places of each source that the positions before `frontier` took; no stage begins after it."""
        return self._blend(self.stages[-1]).used(frontier - self.stages[-1].position)

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
    sources = saved.sources + wanted.sources[len(saved.sources) :]
    return replace(saved, sources=sources).with_weights(wanted.stages[0].weights, frontier)


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
                "it is read with changed; restore them, or let `keye remap` say what of the new data is still due"
            )
        elif source.block_samples != before.block_samples:
            yield (
                f"source {source.name} is cut into blocks of {source.block_samples} samples, but was of {before.block_samples}: set "
                "data.order.block_bytes back"
            )
