"""A batch on its way through the blocks; in two parts under a token policy, so that a backward pass works on kept tokens alone.

A loss that reads no dropped token has no gradient there: queries of dropped tokens are not read either, and as keys they count nothing
but what `eps` lets through (`ops.policy_attention`), which is little unless dropped keys alone are near a row's maximum. What is left out
is measured in the backward pass. The forward pass of dropped tokens is needed: the policy's own gradient asks what they would have done.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAK = 1e-3  # of the norm of the gradient of a block's queries, keys and values: what `eps` may give to dropped tokens and is left out


class DroppedGradient(RuntimeError):
    """Dropped tokens have a gradient that a backward pass over kept ones would leave out."""


class Split:
    """Which rows of B x N tokens are kept: policy [B, N], 0 where a token is dropped."""

    def __init__(self, policy: Tensor) -> None:
        kept = policy.detach().flatten() > 0
        self.shape, self.kept, self.dropped = policy.shape, kept.nonzero().flatten(), (~kept).nonzero().flatten()

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, C] -> its kept rows [L, C] and, as constants, its dropped ones [M, C]."""
        return _Take.apply(x, self.kept), x.detach().flatten(0, 1)[self.dropped]

    def join(self, kept: Tensor, dropped: Tensor, leak: float = 0.0) -> Tensor:
        """Rows [L, C] and [M, C] -> [B, N, C]; the gradient is that of the kept ones.

        In the backward pass raises DroppedGradient where the norm of the others' is more than `leak` of it.
        """
        return _Join.apply(kept, dropped, self, leak)


class State(NamedTuple):
    """A batch on its way through the blocks."""
    x: Tensor | None                    # [B, P+n, C], or packed rows [R, C] with `mask`; None while blocks run
    policy: Tensor | None = None        # [B, P+N] training: keys to attend
    mask: Tensor | None = None          # bool [B, P+N] adaptive counts: tokens that are left
    cu_seqlens: Tensor | None = None    # int32 [B+1] adaptive counts
    decisions: tuple[Tensor, ...] = ()
    stages: tuple[Tensor, ...] = ()     # a stage: ids [B, K] that it keeps of those before it; adaptive counts: bool [B, N]
    num_patches: int = 0                # of this batch's images
    split: Split | None = None          # training, sparse_backward: x is the kept rows [L, C]
    dropped: Tensor | None = None       # the others [M, C]
    normal: Tensor | None = None        # x as the next block's first norm makes it, where tokens were selected and normalised in one

    def on_grid(self) -> list[Tensor]:
        """`stages` with ids on the original grid, for whoever asks: logits need no gather."""
        found: list[Tensor] = []
        for ids in self.stages:
            found.append(ids if not found or ids.dtype == torch.bool else found[-1].gather(1, ids))
        return found

    def whole(self) -> "State":
        """With all tokens in x."""
        return self if self.split is None else self._replace(x=self.split.join(self.x, self.dropped), split=None, dropped=None)

    def parted(self, at_least: tuple[int, float]) -> "State":
        """In two parts by the policy, where so many activations are dropped and such a share of all; else as it is."""
        if self.policy is None:
            return self
        split = Split(self.policy)
        count, share = split.dropped.numel() * self.x.shape[-1], split.dropped.numel() / max(self.policy.numel(), 1)
        if count < at_least[0] or share < at_least[1]:
            return self
        kept, dropped = split.part(self.x)
        return self._replace(x=kept, split=split, dropped=dropped)


def _first_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph
        raise RuntimeError("PrunedViT: with sparse_backward there is no second derivative; leave sparse_backward off")


def _norm(x: Tensor) -> float:
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()
    return norm if math.isfinite(norm) else torch.linalg.vector_norm(x, dtype=torch.float64).item()  # float32 may overflow; 20 times slower


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.save_for_backward(rows)
        return x.flatten(0, 1)[rows]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        _first_derivative()
        rows, = ctx.saved_tensors
        dx = grad.new_zeros(ctx.shape)
        dx.flatten(0, 1)[rows] = grad
        return dx, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept: Tensor, dropped: Tensor, split: Split, leak: float) -> Tensor:
        ctx.split, ctx.leak = split, leak
        x = kept.new_empty(*split.shape, kept.shape[-1])
        x.flatten(0, 1)[split.kept] = kept
        x.flatten(0, 1)[split.dropped] = dropped
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _first_derivative()
        rows = grad.flatten(0, 1)
        kept, dropped = rows[ctx.split.kept], rows[ctx.split.dropped]
        size, lost = _norm(kept), _norm(dropped)
        if not math.isfinite(lost):
            kept = kept + math.nan  # as it would have spread, for a scaler or a check to see
        elif lost > ctx.leak * size:
            raise DroppedGradient("PrunedViT: with sparse_backward dropped tokens must have no gradient, but theirs is "
                                  f"{lost / size if size else math.inf:.1e} of the kept ones': either the loss reads them (weigh features "
                                  "by `keep`) or attention is so sharp that its eps counts; leave sparse_backward off")
        return kept, None, None, None
