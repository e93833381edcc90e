"""What only a GPU can run: kernels against their CPU twins, and one bfloat16 training step. `pytest -m gpu tests/gpu`."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_keye.config.load import load_config
from megatron_keye.contract.media import PatchGrid
from megatron_keye.data.transport import CollectiveTransport
from megatron_keye.io_server.buffers import BufferPool
from megatron_keye.model.packed_segments import PackedSegments
from megatron_keye.model.vision_attention import attention_kernel, sdpa_attention
from megatron_keye.parallel.launch import run_ranks
from megatron_keye.train.layouts import parse_layout
from megatron_keye.train.verify import compare, proof_config, tolerance, trace_layout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_vision_kernels_equal_sdpa_in_bfloat16(name):
    if name == "flash":
        pytest.importorskip("flash_attn")
    run_ranks(1, partial(_compare_kernel, name), prepare=lambda: None)


def _compare_kernel(name: str) -> None:
    device = torch.device("cuda")
    grids = [PatchGrid(1, 4, 6), PatchGrid(1, 10, 12), PatchGrid(3, 4, 4)]
    segments = PackedSegments.of(grids, device)
    shape = (sum(grid.num_patches for grid in grids), 4, 72)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    kernel = attention_kernel(name, head_dim=72, dtype=torch.bfloat16, device=device)
    expected = sdpa_attention(q.float(), k.float(), v.float(), segments)
    assert (kernel(q, k, v, segments).float() - expected).abs().max() < 2e-2


def test_parcels_reach_the_gpu_from_page_locked_and_from_other_memory():
    run_ranks(1, _send_parcels, prepare=lambda: None)


def _send_parcels() -> None:
    buffers, ordinary = BufferPool(1 << 24), np.arange(1000, dtype=np.int32)
    transport = CollectiveTransport(dist.group.WORLD, torch.device("cuda"))
    for value in range(20):  # blocks of the pool are used again
        answer = buffers.lend(1 << 20)
        answer[:] = value
        sent = transport.scatter([[ordinary, answer]], [ordinary.nbytes + answer.nbytes])
        del answer
        expected = np.concatenate([ordinary.view(np.uint8), np.full(1 << 20, value, np.uint8)])
        assert torch.equal(sent.cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("backend", ["torch", "te"])
def test_a_bfloat16_step_stays_within_its_own_rounding(backend):
    if backend == "te":
        pytest.importorskip("transformer_engine")
    config = proof_config(load_config("debug", [f"kernels.decoder={backend}"]), "bf16")
    reference = trace_layout(config, parse_layout("one"))
    recomputed = trace_layout(config, parse_layout("recompute"))
    assert tolerance(config, reference).holds(compare(recomputed, reference))


def test_te_agrees_with_torch():
    pytest.importorskip("transformer_engine")
    config = proof_config(load_config("debug", ["kernels.decoder=torch"]), "bf16")
    reference = trace_layout(config, parse_layout("one"))
    te = proof_config(load_config("debug", ["kernels.decoder=te"]), "bf16")
    assert compare(trace_layout(te, parse_layout("one")), reference).loss < 1e-2
