"""A small state of one process, and what to compare of it."""

import torch
from torch import nn

from megatron_keye.checkpoint.manifest import RunRecord
from megatron_keye.checkpoint.state import LocalParameter, TrainingState
from megatron_keye.model.names import encoder_pieces

IDENTITY = {"variant": "keye_vl_1_5", "decoder.num_layers": 4, "tokenizer": "abc"}
RESUME = '{"step": 7, "text": "ü\\n"}'


def run_record(step: int) -> RunRecord:
    return RunRecord(step=step, resume_state=RESUME, settings="a: 1\n", ledger="00ff", versions={"torch": "2"})


def make_state(seed: int) -> TrainingState:
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "visual.a.weight": nn.Parameter(torch.randn(5, 3, 2, generator=generator), requires_grad=False),
        "mlp_AR.norm.bias": nn.Parameter(torch.randn(9, generator=generator).bfloat16(), requires_grad=False),
    }
    local = [
        LocalParameter(p, tuple(encoder_pieces({name: torch.empty(p.shape, device="meta")})), 0, 1, saves_whole=True)
        for name, p in parameters.items()
    ]
    return TrainingState(tuple(local), (), (), None)


def values(state: TrainingState) -> list[torch.Tensor]:
    return [local.parameter.detach().clone() for local in state.parameters]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def all_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
