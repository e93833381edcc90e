"""Vocabulary-parallel negative log-likelihood in the run's own precision.

Megatron's version casts logits to float32 and overwrites them, and its vocabulary padding takes part in the softmax, so that
the loss depends on TP. This one keeps float64, computes everything else in float32, leaves the logits as they are, and never
looks at padded rows.

Shapes: T tokens, V vocabulary rows that this TP rank holds.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def token_nll(logits_TV: Tensor, labels_T: Tensor, vocab_size: int, tp: ProcessGroup) -> Tensor:
    """-log p(label) per token, [T], float32 (float64 for float64 logits), the same on every TP rank.

    Rows at or above `vocab_size` are padding. Labels must lie in [0, vocab_size); mask unsupervised tokens afterwards.
    """
    return _VocabParallelNll.apply(logits_TV, labels_T, vocab_size, tp)


class _VocabParallelNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, labels_T, vocab_size, tp):
        first_row = tp.rank() * logits_TV.shape[1]
        # At least one row is real on every rank: padding to a multiple of TP adds fewer than TP rows.
        real_rows = min(logits_TV.shape[1], vocab_size - first_row)
        logits = logits_TV[:, :real_rows]
        largest = logits.amax(dim=1)
        largest = largest if largest.dtype == torch.float64 else largest.float()
        if tp.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tp)
        shifted = logits - largest[:, None]  # in the precision of `largest`, without a copy of the logits in it
        is_mine = (labels_T >= first_row) & (labels_T < first_row + real_rows)
        my_labels = torch.where(is_mine, labels_T - first_row, 0)
        picked = shifted.gather(1, my_labels[:, None]).squeeze(1)
        exponentials = shifted.exp_()
        sums = torch.stack((exponentials.sum(dim=1), torch.where(is_mine, picked, 0)))
        if tp.size() > 1:
            dist.all_reduce(sums, group=tp)
        total, target = sums
        ctx.save_for_backward(exponentials.div_(total[:, None]), is_mine, my_labels)
        ctx.shape_and_dtype = logits_TV.shape, logits_TV.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx, gradient_T):
        probabilities, is_mine, my_labels = ctx.saved_tensors
        (num_tokens, num_rows), dtype = ctx.shape_and_dtype
        real_rows, labels = probabilities.shape[1], my_labels[:, None]
        at_labels = (probabilities.gather(1, labels).squeeze(1) - is_mine.to(probabilities.dtype)) * gradient_T
        gradient = probabilities.new_empty((num_tokens, num_rows), dtype=dtype)
        torch.mul(probabilities, gradient_T[:, None], out=gradient[:, :real_rows])
        gradient[:, :real_rows].scatter_(1, labels, at_labels[:, None].to(dtype))
        gradient[:, real_rows:] = 0
        return gradient, None, None, None
