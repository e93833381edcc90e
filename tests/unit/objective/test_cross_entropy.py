"""The vocabulary-parallel loss against torch's own cross-entropy."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_keye.objective.cross_entropy import token_nll
from megatron_keye.parallel.launch import run_ranks

ONE_RANK = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
"""A tensor-parallel group of one, which takes part in no collective."""
NUM_TOKENS, VOCAB_SIZE = 13, 21
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def inputs(dtype, padded_size=VOCAB_SIZE):
    """Logits whose padded columns are large, so that they show wherever they are looked at; labels at both ends too."""
    generator = torch.Generator().manual_seed(1)
    logits = (10 * torch.randn(NUM_TOKENS, padded_size, generator=generator, dtype=torch.float64)).to(dtype)
    logits[:, VOCAB_SIZE:] = 100.0
    labels = torch.randint(0, VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    labels[:2] = torch.tensor([0, VOCAB_SIZE - 1])
    weights = torch.rand(NUM_TOKENS, generator=generator, dtype=torch.float64)
    return logits, labels, weights


def torch_loss(logits, labels, weights):
    """Loss per token and gradient of the weighted sum, over the real vocabulary; computed in the precision that ours uses."""
    leaf = logits.detach().clone().requires_grad_()
    real = leaf[:, :VOCAB_SIZE]
    wide = real if real.dtype == torch.float64 else real.float()
    nll = F.cross_entropy(wide, labels, reduction="none")
    (nll * weights).sum().backward()
    return nll.detach(), leaf.grad


def our_loss(logits, labels, weights, group):
    leaf = logits.detach().clone().requires_grad_()
    # As in the decoder, logits are no leaf: nothing would keep an operation from overwriting them.
    produced = leaf * 1.0
    before = produced.detach().clone()
    nll = token_nll(produced, labels, VOCAB_SIZE, group)
    (nll * weights).sum().backward()
    assert torch.equal(produced, before), "the logits were overwritten"
    return nll.detach(), leaf.grad


def assert_equal(ours, theirs, dtype):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


@pytest.mark.parametrize("padded_size", [VOCAB_SIZE, VOCAB_SIZE + 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_rank_equals_torch(dtype, padded_size):
    logits, labels, weights = inputs(dtype, padded_size)
    ours = our_loss(logits, labels, weights, ONE_RANK)
    assert_equal(ours, torch_loss(logits, labels, weights), dtype)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (ours[1][:, VOCAB_SIZE:] == 0).all()


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    nll = token_nll(logits, torch.tensor([1, 2]), 3, ONE_RANK)
    assert torch.allclose(nll, torch.tensor([2e4, 1.0986123]))


def test_gradients_agree_with_finite_differences():
    logits, labels, _ = inputs(torch.float64)
    torch.autograd.gradcheck(lambda x: token_nll(x, labels, VOCAB_SIZE, ONE_RANK), (logits.requires_grad_(),))


def loss_of_a_share(dtype, padded_size):
    logits, labels, weights = inputs(dtype, padded_size)
    mine = logits.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    return our_loss(mine, labels, weights, dist.group.WORLD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tp", [2, 3])
def test_split_vocabulary_equals_torch(dtype, tp):
    """21 rows over 2 ranks leave one padded row on the last; over 3 ranks none."""
    padded_size = -(-VOCAB_SIZE // tp) * tp
    shares = run_ranks(tp, loss_of_a_share, dtype, padded_size, prepare=lambda: None)
    expected = torch_loss(*inputs(dtype, padded_size))
    for nll, _ in shares:
        assert_equal((nll, torch.cat([gradient for _, gradient in shares], dim=1)), expected, dtype)
