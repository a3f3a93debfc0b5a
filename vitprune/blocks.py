"""Block pruning: which attention heads and which blocks of MLP hidden units a vision transformer keeps."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .tokens import is_number

if TYPE_CHECKING:
    from .layers import PrunedAttention, PrunedMlp
    from .vit import PrunedViT

METHODS = ("magnitude", "random")
Fractions = float | Sequence[float]


@dataclass(frozen=True)
class BlockPruning:
    """Which heads and hidden units are kept, and how they are chosen.

    heads, hidden: fractions kept, one for all layers or one a layer; int(fraction * count) units remain, at least one
        unless the fraction is 0.
    budget: instead of fractions, one global fraction of the model's multiply-accumulates (those of its images' token
        schedule): the units with the lowest score per multiply-accumulate leave, wherever they are, one of each kind
        staying in every layer.
    method: "magnitude" (mean square of the weights that leave with a unit) or "random" (the control, from `seed`).
    granularity: hidden units are scored and dropped together in blocks of so many; 64 is what the kernels skip, other
        sizes become speed only through `compact`.

    Raises ValueError for values that no model could serve.
    """
    heads: Fractions = 1.0
    hidden: Fractions = 1.0
    method: str = "magnitude"
    granularity: int = 64
    budget: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("heads", "hidden"):
            value = getattr(self, name)
            _require(is_number(value) or (isinstance(value, (list, tuple)) and bool(value) and all(map(is_number, value))), name,
                     "a fraction, or a sequence of them", repr(value))
            if not is_number(value):
                object.__setattr__(self, name, tuple(value))
            _require(all(0 <= f <= 1 for f in ([value] if is_number(value) else value)), name, "in [0, 1]", value)
        _require(self.method in METHODS, "method", f"one of {METHODS}", self.method)
        _require(isinstance(self.granularity, int) and self.granularity >= 1, "granularity", "an int >= 1", repr(self.granularity))
        _require(self.budget is None or is_number(self.budget), "budget", "None or a number", repr(self.budget))
        _require(self.budget is None or 0 < self.budget <= 1, "budget", "None or in (0, 1]", self.budget)
        _require(self.budget is None or (self.heads == 1.0 and self.hidden == 1.0), "budget",
                 "None where heads or hidden are given", self.budget)

    def apply(self, model: PrunedViT) -> None:
        """Choose and set the live units of every layer, in place."""
        depth = len(model.blocks)
        for name in ("heads", "hidden"):
            value = getattr(self, name)
            _require(not isinstance(value, tuple) or len(value) == depth, name, f"one fraction, or one for each of {depth} layers", value)
        for i, block in enumerate(model.blocks):
            hidden = block.mlp.fc1.out_features
            _require(hidden % self.granularity == 0, "granularity", f"a divisor of the hidden size {hidden} of block {i}", self.granularity)
        scores = [(self._scores(head_scores(b.attn), 2 * i), self._scores(hidden_scores(b.mlp, self.granularity), 2 * i + 1))
                  for i, b in enumerate(model.blocks)]
        live = self._by_budget(model, scores) if self.budget is not None else self._by_fraction(scores)
        for block, (heads, hidden) in zip(model.blocks, live):
            block.attn.set_live(heads)
            block.mlp.set_live(hidden, self.granularity)

    def _scores(self, magnitude: Tensor, stream: int) -> Tensor:
        if self.method == "magnitude":
            return magnitude
        return torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(self.seed * 65537 + stream))

    def _by_fraction(self, scores: list[tuple[Tensor, Tensor]]) -> list[tuple[list[int], list[int]]]:
        def of(value: Fractions, i: int) -> float:
            return value[i] if isinstance(value, tuple) else value

        return [(top(h, of(self.heads, i)), top(f, of(self.hidden, i))) for i, (h, f) in enumerate(scores)]

    def _by_budget(self, model: PrunedViT, scores: list[tuple[Tensor, Tensor]]) -> list[tuple[list[int], list[int]]]:
        units = []  # (score, cost, layer, kind, id); the scores are means, so they are per weight and so per MAC
        for i, (block, tokens) in enumerate(zip(model.blocks, tokens_per_block(model))):
            C, D = block.attn.qkv.in_features, block.attn.head_dim
            costs = (4 * tokens * C * D + 2 * tokens * tokens * D, 2 * tokens * C * self.granularity)
            for kind, (values, cost) in enumerate(zip(scores[i], costs)):
                best = int(values.argmax()) if values.numel() else -1
                units += [(float(s), cost, i, kind, j) for j, s in enumerate(values) if j != best]
        dead, excess = set(), (1 - self.budget) * count_macs(model)
        for _, cost, i, kind, j in sorted(units):
            if excess <= 0:
                break
            dead.add((i, kind, j))
            excess -= cost
        _require(excess <= 0, "budget", "reachable with one head and one hidden block in every layer", self.budget)
        return [tuple([j for j in range(s.numel()) if (i, kind, j) not in dead] for kind, s in enumerate(pair))
                for i, pair in enumerate(scores)]


def _require(condition: bool, argument: str, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"BlockPruning: {argument} must be {expected}, got {got}")


def top(scores: Tensor, fraction: float) -> list[int]:
    """Ascending ids of the int(fraction * n) best scores, at least one unless the fraction is 0; ties to the lower id."""
    n = scores.numel()
    k = 0 if fraction == 0 else min(n, max(1, int(fraction * n + 1e-9)))
    return (-scores).sort(stable=True).indices[:k].sort().values.tolist()


@torch.no_grad()
def head_scores(attn: PrunedAttention) -> Tensor:
    """Mean square of each head's q, k and v rows and output columns, float32 [H] on the CPU."""
    H, D = attn.num_heads, attn.head_dim
    if H == 0:
        return torch.zeros(0)
    qkv = attn.qkv.weight.float().square().view(3, H, -1).sum((0, 2))
    proj = attn.proj.weight.float().square().view(-1, H, D).sum((0, 2))
    return ((qkv + proj) / (D * (3 * attn.qkv.in_features + attn.proj.out_features))).cpu()


@torch.no_grad()
def hidden_scores(mlp: PrunedMlp, width: int) -> Tensor:
    """Mean square of each hidden block's fc1 rows and fc2 columns, float32 [F / width] on the CPU."""
    units = mlp.fc1.weight.float().square().sum(1) + mlp.fc2.weight.float().square().sum(0)
    return (units.view(-1, width).mean(1) / (mlp.fc1.in_features + mlp.fc2.out_features)).cpu()


def tokens_per_block(model: PrunedViT) -> list[int]:
    """Tokens each block sees in evaluation, prefix included, at the model's own image size."""
    n, counts = model.patch_embed.num_patches, dict(zip(model.tokens.at, model.keep_counts)) if model.tokens else {}
    out = []
    for i in range(len(model.blocks)):
        n = counts.get(i, n)
        out.append(n + model.num_prefix_tokens)
    return out


def count_macs(model: PrunedViT) -> int:
    """Multiply-accumulates of one image with every unit live: matrix products and the patch convolution."""
    seen = tokens_per_block(model)
    total = model.patch_embed.proj.weight.numel() * model.patch_embed.num_patches
    for block, n in zip(model.blocks, seen):
        weights = sum(w.numel() for w in (block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight))
        total += n * weights + 2 * n * n * block.attn.num_heads * block.attn.head_dim
    if model.tokens is not None and model.tokens.score == "predictor":
        for i, predictor in zip(model.tokens.at, model.score_predictor):
            before = (seen[i - 1] if i else model.patch_embed.num_patches + model.num_prefix_tokens) - model.num_prefix_tokens
            total += before * sum(p.numel() for p in predictor.parameters() if p.dim() == 2)
    return total + sum(p.numel() for n, p in model.named_parameters() if n in ("head.weight", "head_dist.weight"))
