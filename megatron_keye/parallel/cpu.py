"""The one adapter that lets pinned Megatron-core 0.16.1 run on CPU with gloo, and in float64.

Megatron names CUDA devices literally, compares tensor type strings with `torch.cuda.*`, and calls `torch.cuda` for random
state and streams. Call `adapt_to_cpu` once per process, before anything of Megatron is built; a process that has CUDA
never calls it. Float64 additionally turns Megatron's float32 places (the gradient norm, the optimizer's main parameters
and state) into float64, which is what proofs need and nothing else wants.
"""

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode


class _CpuMode(TorchFunctionMode):
    """Redirects CUDA devices in factory calls and answers type questions as a CUDA tensor would."""

    def __init__(self, float64: bool):
        super().__init__()
        self.float64 = float64

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args).replace("torch.", "torch.cuda.", 1)
            return name.replace("Double", "Float") if self.float64 else name
        if self.float64 and func is torch.Tensor.float:
            return args[0].double()
        if self.float64 and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def adapt_to_cpu(float64: bool) -> None:
    """Make this process run Megatron on CPU; `float64` only where the run's precision is float64."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = lambda *args: None
    torch.cuda.memory_allocated = lambda *args: 0
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(torch.cuda, name, getattr(torch, name))
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    _CpuMode(float64).__enter__()
