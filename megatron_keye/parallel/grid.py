"""The rank grid as arithmetic: which rank sits where, and which ranks form a group. No processes.

Ranks are numbered with TP fastest, then CP, PP and DP, so that the ranks of one replica (one copy of the decoder) are
neighbours: a replica exchanges pixels and embeddings with itself only, which then stays on as few hosts as possible.
"""

from dataclasses import dataclass
from itertools import product

AXES = ("tp", "cp", "pp", "dp")
"""Fastest first. `rank`, `replica` and `stage_ranks` below follow from this order and nothing else in the project knows it."""


@dataclass(frozen=True, slots=True)
class RankGrid:
    """Sizes of the decoder's parallel axes."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the decoder."""
        return self.tp * self.cp * self.pp

    def size(self, axis: str) -> int:
        return {"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp": self.dp}[axis]

    def coordinate(self, rank: int, axis: str) -> int:
        """Place of `rank` along `axis`."""
        for name in AXES:
            if name == axis:
                return rank % self.size(name)
            rank //= self.size(name)
        raise KeyError(axis)

    def rank(self, *, tp: int = 0, cp: int = 0, pp: int = 0, dp: int = 0) -> int:
        return tp + self.tp * (cp + self.cp * (pp + self.pp * dp))

    def replica(self, rank: int) -> int:
        """Number of the replica that `rank` belongs to."""
        return rank // self.replica_size

    def replica_rank(self, rank: int) -> int:
        """Place of `rank` within its replica; 0 is the leader, the only rank of a replica that reads data."""
        return rank % self.replica_size

    def stage_ranks(self, stage: int) -> tuple[int, ...]:
        """Places within a replica of the ranks of pipeline stage `stage`."""
        per_stage = self.tp * self.cp
        return tuple(range(stage * per_stage, (stage + 1) * per_stage))

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups of ranks that differ only along `axes`, each in rank order, together covering the world once."""
        unknown = set(axes) - set(AXES)
        if unknown:
            raise KeyError(f"unknown axes {sorted(unknown)}; known are {AXES}")
        fixed = [axis for axis in AXES if axis not in axes]
        moving = [axis for axis in AXES if axis in axes]
        groups = []
        for outer in product(*(range(self.size(a)) for a in reversed(fixed))):
            place = dict(zip(reversed(fixed), outer, strict=True))
            group = [
                self.rank(**place, **dict(zip(reversed(moving), inner, strict=True)))
                for inner in product(*(range(self.size(a)) for a in reversed(moving)))
            ]
            groups.append(sorted(group))
        return groups
