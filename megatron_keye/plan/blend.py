"""Several sources as one endless sequence, by weights: position -> source and place in that source, at a constant price, nothing stored.

Positions come in cycles of CYCLE. Each cycle holds a whole number of samples of every source, its weight, at places that a keyed
permutation mixes. So the place in a source follows from the cycle's number and one cycle's permutation, and any long stretch keeps
the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_keye.errors import PlanError
from megatron_keye.plan.order import Order, Permutation

CYCLE = 16_384
"""Positions in which every source occurs exactly as often as its weight says."""
CACHED_CYCLES = 4

_NEWTON_STEPS = 200
_TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True)
class SourceTotals:
    """What an index says of a source in all: samples, and tokens by modality, in the same order for every source."""

    name: str
    num_samples: int
    tokens: tuple[int, ...]


def weights_by_repeats(sources: Sequence[SourceTotals], repeats: Sequence[float]) -> tuple[int, ...]:
    """Weights with which sources run through `repeats` epochs in the same time; 1 for all keeps the data as it is."""
    return _whole_weights(sources, np.array([s.num_samples * r for s, r in zip(sources, repeats, strict=True)], np.float64))


def weights_by_token_shares(
    sources: Sequence[SourceTotals], shares: Sequence[float], repeats: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Weights that sum to CYCLE and with which modalities have `shares` (summing to 1) of all tokens.

    Of all such weights, those closest to what `repeats` would give, by relative entropy: sources that share a modality keep their
    proportions. Raises PlanError where no weights reach the shares.
    """
    shares = np.array(shares, np.float64)
    if (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise PlanError(f"Token shares are {shares.tolist()}, expected numbers from 0 on that sum to 1.")
    repeats = [1.0] * len(sources) if repeats is None else repeats
    base = np.array([s.num_samples * r for s, r in zip(sources, repeats, strict=True)], np.float64)
    mean_tokens = np.array([np.array(s.tokens) / max(s.num_samples, 1) for s in sources])
    # Tokens above what the shares allow, per sample: weights are right when these cancel out.
    surplus = mean_tokens - shares * mean_tokens.sum(axis=1, keepdims=True)
    weights = base * np.exp(_log_factors(surplus / max(mean_tokens.max(), 1), base))
    whole = _whole_weights(sources, weights)
    reached = token_shares(sources, whole)
    if max(abs(a - b) for a, b in zip(reached, shares, strict=True)) > 0.005:
        raise PlanError(
            f"No weights of {[s.name for s in sources]} give token shares {shares.tolist()}; the nearest give "
            f"{[round(share, 4) for share in reached]}. Add data of the scarce modality or ask for shares between those of the sources."
        )
    return whole


def token_shares(sources: Sequence[SourceTotals], weights: Sequence[int]) -> tuple[float, ...]:
    """Share of all tokens that each modality has in the long run."""
    per_sample = np.array([np.array(s.tokens) / max(s.num_samples, 1) for s in sources])
    tokens = np.array(weights) @ per_sample
    return tuple((tokens / max(tokens.sum(), 1e-300)).tolist())


def _log_factors(surplus: np.ndarray, base: np.ndarray) -> np.ndarray:
    """float64 [sources]: the exponents `surplus @ x` of the x that makes base * exp(surplus @ x) cancel the surplus of every modality.

    That is the minimum of the convex sum of base * exp(surplus @ x), found by damped Newton steps.
    """
    base = base / max(base.sum(), 1e-300)
    x = np.zeros(surplus.shape[1])
    for _ in range(_NEWTON_STEPS):
        weights = base * np.exp(surplus @ x)
        gradient = surplus.T @ weights
        if np.abs(gradient).max() <= _TOLERANCE * weights.sum():
            break
        hessian = surplus.T @ (weights[:, None] * surplus)
        ridge = 1e-12 * max(np.trace(hessian), 1e-300)
        step = np.linalg.solve(hessian + ridge * np.eye(len(x)), -gradient)
        size = 1.0
        while size > 1e-9 and (base * np.exp(np.clip(surplus @ (x + size * step), -700, 700))).sum() > weights.sum():
            size /= 2
        x = x + size * step
    return np.clip(surplus @ x, -700, 700)


def _whole_weights(sources: Sequence[SourceTotals], weights: np.ndarray) -> tuple[int, ...]:
    """Whole numbers that sum to CYCLE, nearest to `weights` by largest remainders; at least 1 for a source with any weight."""
    empty = [s.name for s, w in zip(sources, weights, strict=True) if w > 0 and s.num_samples < 1]
    if empty or not weights.sum() > 0 or (weights < 0).any():
        raise PlanError(
            f"Weights {weights.tolist()} of sources {[s.name for s in sources]} cannot be used: expected none below 0, one above, and "
            f"samples in every source that has one (empty: {empty})."
        )
    exact = weights / weights.sum() * CYCLE
    whole = np.where(weights > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    order = np.lexsort((np.arange(len(exact)), -(exact - whole)))
    missing = CYCLE - int(whole.sum())
    if missing >= 0:
        whole[order[:missing]] += 1
    else:
        whole[int(whole.argmax())] += missing
    return tuple(whole.tolist())


class Blend:
    """Sources mixed by `weights`, which sum to CYCLE, from place `starts[source]` of each on.

    Every source is used in its own order: its first n places are used up when it has occurred n times.
    """

    def __init__(self, weights: Sequence[int], starts: Sequence[int], seed: int):
        if sum(weights) != CYCLE or min(weights) < 0 or len(starts) != len(weights):
            raise PlanError(f"A blend's weights are {weights}, expected numbers from 0 on that sum to {CYCLE}, and a start for each.")
        self.weights, self.starts, self._seed = np.array(weights, np.int64), np.array(starts, np.int64), seed
        self._cycle = lru_cache(CACHED_CYCLES)(self._make_cycle)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and place in that source's own endless order of each of `positions`: int64 [n] twice."""
        cycles, offsets = np.divmod(positions, CYCLE)
        sources, ranks = np.empty_like(offsets), np.empty_like(offsets)
        for cycle in np.unique(cycles).tolist():
            here = cycles == cycle
            sources[here], ranks[here] = (column[offsets[here]] for column in self._cycle(cycle))
        return sources, self.starts[sources] + cycles * self.weights[sources] + ranks

    def used(self, position: int) -> tuple[int, ...]:
        """Place that each source stands at after the first `position` positions: the starts of a blend that goes on from there."""
        cycles, rest = divmod(position, CYCLE)
        counts = np.bincount(self._cycle(cycles)[0][:rest], minlength=len(self.weights))
        return tuple((self.starts + cycles * self.weights + counts).tolist())

    def _make_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position of a cycle, and how often it occurred before in the cycle: int64 [CYCLE] twice."""
        mixed = Permutation(CYCLE, f"blend: seed {self._seed}, cycle {cycle}".encode()).of(np.arange(CYCLE))
        sources = np.searchsorted(np.cumsum(self.weights), mixed, side="right")
        ranks = np.empty(CYCLE, np.int64)
        ranks[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(weight) for weight in self.weights])
        return sources, ranks


class BlendedOrder:
    """Samples of several sources in one endless order. A new mixture begins at a position and leaves all before it as it was."""

    def __init__(self, orders: Sequence[Order], stages: Sequence[tuple[int, Blend]]):
        """`orders` of the sources, whose samples are numbered one source after another; `stages` pairs of first position and blend."""
        firsts = [first for first, _ in stages]
        if not stages or firsts != sorted(set(firsts)):
            raise PlanError(f"The stages of a mixture begin at positions {firsts}, expected rising ones.")
        self._orders, self._blends = orders, [blend for _, blend in stages]
        self._firsts = np.array(firsts, np.int64)
        self._first_samples = np.concatenate([[0], np.cumsum([order.num_samples for order in orders])])
        self.num_samples = int(self._first_samples[-1])

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions`, int64 [n]."""
        sources, places = self.places(positions)
        samples = np.empty_like(positions)
        for source in np.unique(sources).tolist():
            here = sources == source
            samples[here] = self._first_samples[source] + self._orders[source](places[here])
        return samples

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of `positions` and the place in that source's own order: int64 [n] twice."""
        stages = np.searchsorted(self._firsts, positions, side="right") - 1
        if len(stages) and stages.min() < 0:
            raise PlanError(f"Position {positions.min()} is before the mixture's first stage, which begins at {self._firsts[0]}.")
        sources, places = np.empty_like(positions), np.empty_like(positions)
        for stage in np.unique(stages).tolist():
            here = stages == stage
            sources[here], places[here] = self._blends[stage](positions[here] - self._firsts[stage])
        return sources, places
