"""The process side of a run: which rank this is, its device, and the world's process groups."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_keye.config.derive import num_replicas, require_valid
from megatron_keye.config.schema import RunConfig
from megatron_keye.parallel.cpu import adapt_to_cpu
from megatron_keye.parallel.groups import Groups, build_groups, prepare_megatron
from megatron_keye.train.placement import rank_grid

COLLECTIVE_TIMEOUT_S = 1800
ADD_IN_ORDER = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Ring"}
"""What cuBLAS, Transformer Engine and NCCL look for in the environment when they start."""


@dataclass(frozen=True)
class Runtime:
    """This process in its world."""

    groups: Groups
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The rank that writes metrics, ledger and messages."""
        return self.groups.rank == 0


def world_size_from_environment() -> int:
    """Processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(config: RunConfig) -> Runtime:
    """Join the world that torchrun describes in the environment (a world of one without it) and build all groups.

    NCCL where every local process has a GPU, gloo on CPU otherwise. Raises SettingsError, on every rank alike and before any
    connection, when the settings do not fit the number of processes.
    """
    world_size = world_size_from_environment()
    require_valid(config, world_size)
    if config.train.deterministic:
        _repeat_exactly()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        adapt_to_cpu(float64=config.train.precision == "fp64")
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return of_started_world(config, device)


def _repeat_exactly() -> None:
    """Before CUDA and NCCL start. What is in the environment already stays, such as another algorithm of NCCL's."""
    for name, value in ADD_IN_ORDER.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # Memory that nobody has written yet need not be filled for that.
    torch.utils.deterministic.fill_uninitialized_memory = False


def of_started_world(config: RunConfig, device: torch.device) -> Runtime:
    """Build all groups in a world that was joined already."""
    groups = build_groups(rank_grid(config, num_replicas(config, dist.get_world_size())))
    prepare_megatron(groups, config.train.seed)
    return Runtime(groups, device)


def stop() -> None:
    """Leave the world. gloo's groups are left to the end of the process: destroying them while a peer still does the same
    aborted 3 of 12 processes ("terminate called without an active exception")."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.destroy_process_group()
