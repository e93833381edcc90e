"""Process groups, built once and passed as arguments.

Megatron's `parallel_state` is never initialised: where Megatron-core 0.16.1 falls back to it, that fallback raises, so a
group that somebody forgot to pass is an error and never silently the wrong ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from megatron_keye.parallel.grid import RankGrid


@dataclass(frozen=True)
class Groups:
    """This rank's place and its groups. All fields are required."""

    grid: RankGrid
    rank: int
    world: ProcessGroup
    single: ProcessGroup
    """This rank alone."""
    replica: ProcessGroup
    """TP x CP x PP: pixels and embeddings travel here."""
    tp: ProcessGroup
    cp: ProcessGroup
    pp: ProcessGroup
    dp: ProcessGroup
    decoder: ProcessGroupCollection
    """What Megatron needs for the decoder."""
    encoder: ProcessGroupCollection
    """What Megatron's DDP and optimizer need for the ViT and projector: data-parallel over the world."""

    def coordinate(self, axis: str) -> int:
        return self.grid.coordinate(self.rank, axis)

    @property
    def replica_rank(self) -> int:
        return self.grid.replica_rank(self.rank)

    @property
    def leader(self) -> int:
        """Global rank of this replica's leader."""
        return self.grid.rank(dp=self.coordinate("dp"))

    @property
    def is_leader(self) -> bool:
        return self.rank == self.leader

    @property
    def is_first_stage(self) -> bool:
        return self.coordinate("pp") == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinate("pp") == self.grid.pp - 1


def build_groups(grid: RankGrid) -> Groups:
    """Build every group of `grid` over the initialised world; all ranks must call it, at the same place.

    Raises ValueError when the world has another size than the grid.
    """
    if dist.get_world_size() != grid.world_size:
        raise ValueError(f"the grid {grid} needs {grid.world_size} ranks, the world has {dist.get_world_size()}")
    rank = dist.get_rank()
    new = _group_maker(rank)
    single = new([[r] for r in range(grid.world_size)])
    tp, cp, pp, dp = (new(grid.groups(axis)) for axis in ("tp", "cp", "pp", "dp"))
    dp_cp = new(grid.groups("dp", "cp"))
    replica = new(grid.groups("tp", "cp", "pp"))
    decoder = ProcessGroupCollection(
        tp=tp, cp=cp, pp=pp, dp=dp, dp_cp=dp_cp, intra_dp_cp=dp_cp, tp_cp=new(grid.groups("tp", "cp")),
        mp=new(grid.groups("tp", "pp")), ep=single, expt_tp=single, expt_dp=single, intra_expt_dp=single,
        tp_ep_pp=new(grid.groups("tp", "pp")), intra_dist_opt=dist.group.WORLD, embd=None, pos_embd=None,
    )  # fmt: skip
    return Groups(
        grid=grid, rank=rank, world=dist.group.WORLD, single=single, replica=replica, tp=tp, cp=cp, pp=pp, dp=dp,
        decoder=decoder, encoder=encoder_collection(single),
    )  # fmt: skip


def prepare_megatron(groups: Groups, seed: int) -> None:
    """Give Megatron the only two process-wide things it cannot do without: seeded random states for its tensor-parallel
    regions, and the scratch buffer into which sequence parallelism gathers activations."""
    parallel_state._set_global_memory_buffer()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=groups.coordinate("tp"), ep_rank=0, etp_rank=0)


def encoder_collection(single: ProcessGroup) -> ProcessGroupCollection:
    """Groups of a module that is data-parallel over the world.

    Every model-parallel group is this rank alone: with the decoder's TP group, parameters without a TP attribute would
    count only on TP rank 0, and the gradient norm would come out too small without an error.
    """
    world = dist.group.WORLD
    return ProcessGroupCollection(
        tp=single, cp=single, pp=single, ep=single, mp=single, tp_ep_pp=single, expt_dp=single, intra_expt_dp=single,
        dp=world, dp_cp=world, intra_dp_cp=world, intra_dist_opt=world, embd=None, pos_embd=None,
    )  # fmt: skip


def _group_maker(rank: int) -> Callable[[list[list[int]]], ProcessGroup | None]:
    """A function that creates all listed groups on all ranks and returns the one that holds `rank`, once per membership."""
    made: dict[tuple[tuple[int, ...], ...], ProcessGroup | None] = {}

    def new(members: list[list[int]]) -> ProcessGroup | None:
        key = tuple(map(tuple, members))
        if key not in made:
            mine = None
            for ranks in members:
                group = dist.new_group(ranks)
                if rank in ranks:
                    mine = group
            made[key] = mine
        return made[key]

    return new
