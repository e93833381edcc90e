"""This rank's shards of Megatron's distributed optimizer (0.16.1): found, read and filled through its public attributes.

Its own `sharded_state_dict` is not used: `fully_reshardable` gathers all weights and moments on every data-parallel rank,
corrupts state that lies in several gradient buckets, and gives all parameters one shared `step` tensor, to which AdamW then
adds once per parameter.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerShard:
    """The flat range [start, stop) of a parameter whose main weights and moments this rank holds."""

    start: int
    stop: int
    main: Tensor
    """[stop - start], in the optimizer's precision. In float32 and float64 runs it is the parameter's own memory."""
    optimizer: torch.optim.Optimizer
    group: dict
    """The optimizer's parameter group that `main` belongs to."""

    def moments(self) -> dict[str, Tensor]:
        """Empty before the first update."""
        state = self.optimizer.state.get(self.main, {})
        return {name: state[name] for name in MOMENTS if name in state}

    def step(self) -> int:
        """Updates that the moments have seen."""
        if not self.moments():
            return 0
        return int(self.optimizer.state[self.main].get("step", self.group.get("step")))

    def restart(self, step: int) -> dict[str, Tensor]:
        """Forget the moments, or, for `step` > 0, make zero ones that have seen `step` updates; returns those, to be filled."""
        self.optimizer.state.pop(self.main, None)
        if step == 0:
            return {}
        moments = {name: torch.zeros_like(self.main) for name in MOMENTS}
        if isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            # A tensor of its own for each parameter: AdamW counts in place.
            self.optimizer.state[self.main] = {"step": torch.tensor(float(step)), **moments}
        else:
            # Transformer Engine's and Apex's FusedAdam count once per group.
            self.optimizer.state[self.main] = dict(moments)
            self.group["step"] = max(step, self.group.get("step", 0))
        return moments


def optimizer_shards(optimizers: Iterable) -> dict[nn.Parameter, OptimizerShard | None]:
    """Every parameter that Megatron's `DistributedOptimizer`s train; None where other data-parallel ranks hold all of it."""
    shards: dict[nn.Parameter, OptimizerShard | None] = {}
    for optimizer in optimizers:
        if optimizer.is_stub_optimizer:
            continue
        for buffer in optimizer.buffers:
            shards.update(dict.fromkeys(buffer.param_index_map))
        for parameter, (buffer, dtype, bucket) in optimizer.model_param_gbuf_map.items():
            owned = optimizer.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
            number, place = optimizer.model_param_group_index_map[parameter]
            group = optimizer.optimizer.param_groups[number]
            shards[parameter] = OptimizerShard(owned.start, owned.end, group["params"][place], optimizer.optimizer, group)
    return shards
