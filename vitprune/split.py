"""A batch on its way through the blocks; in two parts under a token policy, so that a backward pass works on kept tokens alone.

A loss that reads no dropped token has no gradient there: queries of dropped tokens are not read either, and as keys they count nothing
but what `eps` lets through (`ops.policy_attention`: eps / N of a weight, in float32 below rounding unless dropped keys alone are near a
row's maximum). Their forward pass is still needed, since the policy's own gradient asks what they would have done.
"""
from typing import NamedTuple

import torch
from torch import Tensor


class Split:
    """Which rows of B x N tokens are kept: policy [B, N], 0 where a token is dropped."""

    def __init__(self, policy: Tensor) -> None:
        kept = policy.detach().flatten() > 0
        self.shape, self.kept, self.dropped = policy.shape, kept.nonzero().flatten(), (~kept).nonzero().flatten()

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, C] -> its kept rows [L, C] and, as constants, its dropped ones [M, C]."""
        return _Take.apply(x, self.kept), x.detach().flatten(0, 1)[self.dropped]

    def join(self, kept: Tensor, dropped: Tensor, last: bool = False) -> Tensor:
        """Rows [L, C] and [M, C] -> [B, N, C]; the gradient is that of the kept ones.

        last: raise RuntimeError in the backward pass where dropped ones have a gradient too.
        """
        return _Join.apply(kept, dropped, self, last)


class State(NamedTuple):
    """A batch on its way through the blocks."""
    x: Tensor                           # [B, P+n, C], or packed rows [R, C] with `mask`
    policy: Tensor | None = None        # [B, P+N] training: keys to attend
    kept: Tensor | None = None          # [B, n] ids of the patches that are left; None: all
    mask: Tensor | None = None          # bool [B, P+N] adaptive counts: tokens that are left
    cu_seqlens: Tensor | None = None    # int32 [B+1] adaptive counts
    decisions: tuple[Tensor, ...] = ()
    stages: tuple[Tensor, ...] = ()     # ids kept after each stage, on the original grid
    num_patches: int = 0                # of this batch's images
    split: Split | None = None          # training, sparse_backward: x is the kept rows [L, C]
    dropped: Tensor | None = None       # the others [M, C]

    def whole(self, last: bool = False) -> "State":
        """With all tokens in x; last: see Split.join."""
        if self.split is None:
            return self
        return self._replace(x=self.split.join(self.x, self.dropped, last), split=None, dropped=None)

    def parted(self) -> "State":
        """In two parts by the policy; as it is where there is none."""
        if self.policy is None:
            return self
        split = Split(self.policy)
        kept, dropped = split.part(self.x)
        return self._replace(x=kept, split=split, dropped=dropped)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.save_for_backward(rows)
        return x.flatten(0, 1)[rows]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        rows, = ctx.saved_tensors
        dx = grad.new_zeros(ctx.shape)
        dx.flatten(0, 1)[rows] = grad
        return dx, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept: Tensor, dropped: Tensor, split: Split, last: bool) -> Tensor:
        ctx.split, ctx.last = split, last
        x = kept.new_empty(*split.shape, kept.shape[-1])
        x.flatten(0, 1)[split.kept] = kept
        x.flatten(0, 1)[split.dropped] = dropped
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows = grad.flatten(0, 1)
        if ctx.last and rows[ctx.split.dropped].any():
            raise RuntimeError("PrunedViT: with sparse_backward the loss must not depend on the features of dropped tokens, "
                               "but it has a gradient there (weigh features by `keep`, or leave sparse_backward off)")
        return rows[ctx.split.kept], None, None, None
