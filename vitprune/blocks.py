"""Block pruning: which attention heads and which blocks of MLP hidden units a vision transformer keeps."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import learned
from .learned import Cubic
from .tokens import is_int, is_number

if TYPE_CHECKING:
    from .layers import PrunedAttention, PrunedMlp
    from .vit import PrunedViT

METHODS = ("magnitude", "random", "movement", "gates")
Fractions = float | Sequence[float]


@dataclass(frozen=True)
class BlockPruning:
    """Which heads and hidden units are kept, and how they are chosen.

    heads, hidden: fractions kept, one for all layers or one a layer; int(fraction * count) units remain, at least one
        unless the fraction is 0. heads="h_0.5_d_0.4-...": EdgeVisionTransformer's string gives both, a part a layer.
    method: "magnitude" (mean square of the weights that leave with a unit), "random" (the control, from `seed`), both
        chosen at once; or learned while the model trains: "movement" (straight-through scores) and "gates" (factors
        under an L1 `regulariser`).
    granularity: hidden units are scored and dropped together in blocks of so many; 64 is what the kernels skip, other
        sizes become speed only through `compact`.
    head_dim: fraction of the dimensions kept, the same count in every head; attention keeps its scale.
    budget: instead of fractions, one global fraction of the model's multiply-accumulates (those of its images' token
        schedule): the units with the lowest score per multiply-accumulate leave, wherever they are, one of each kind
        staying in every layer.
    start: of movement's scores: "sensitivity" of the loss to each unit, gathered while nothing is pruned (the default but with
        a threshold), or "zero" as in nn_pruning.
    threshold: movement instead of fractions: units stay whose sigmoid(score) exceeds it; the regulariser lowers scores.
    schedule, regulariser: of learned scores; see Cubic and `learned.penalty`.

    Raises ValueError for values that no model could serve.
    """
    heads: Fractions | str = 1.0
    hidden: Fractions = 1.0
    method: str = "magnitude"
    granularity: int = 64
    head_dim: float = 1.0
    budget: float | None = None
    seed: int = 0
    start: str | None = None
    threshold: float | None = None
    schedule: Cubic = Cubic()
    regulariser: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.heads, str):
            _require(self.hidden == 1.0, "hidden", "1.0 where heads is a string that gives both", self.hidden)
            for name, value in zip(("heads", "hidden"), parse_spec(self.heads)):
                object.__setattr__(self, name, value)
        if isinstance(self.schedule, dict):
            object.__setattr__(self, "schedule", Cubic(**self.schedule))
        for name in ("heads", "hidden"):
            value = getattr(self, name)
            _require(is_number(value) or (isinstance(value, (list, tuple)) and bool(value) and all(map(is_number, value))), name,
                     "a fraction, or a sequence of them", repr(value))
            if not is_number(value):
                object.__setattr__(self, name, tuple(value))
            _require(all(0 <= f <= 1 for f in ([value] if is_number(value) else value)), name, "in [0, 1]", value)
        _require(self.method in METHODS, "method", f"one of {METHODS}", self.method)
        for name, least in (("granularity", 1), ("seed", 0)):
            _require(is_int(getattr(self, name)) and getattr(self, name) >= least, name, f"an int >= {least}", repr(getattr(self, name)))
        _require(isinstance(self.schedule, Cubic), "schedule", "a Cubic", repr(self.schedule))
        _require(self.start in (None, "sensitivity", "zero"), "start", "None, 'sensitivity' or 'zero'", repr(self.start))
        _require(self.start is None or self.method == "movement", "start", f"None for method={self.method!r}", repr(self.start))
        _require(self.start != "sensitivity" or self.threshold is None, "start", "None or 'zero' with a threshold", repr(self.start))
        _require(is_number(self.head_dim) and 0 < self.head_dim <= 1, "head_dim", "in (0, 1]", self.head_dim)
        _require(self.budget is None or is_number(self.budget), "budget", "None or a number", repr(self.budget))
        _require(self.budget is None or 0 < self.budget <= 1, "budget", "None or in (0, 1]", self.budget)
        fractions = self.heads != 1.0 or self.hidden != 1.0
        _require(self.budget is None or not fractions, "budget", "None where heads or hidden are given", self.budget)
        _require(self.threshold is None or (is_number(self.threshold) and 0 < self.threshold < 1), "threshold", "None or in (0, 1)",
                 self.threshold)
        _require(self.threshold is None or self.method == "movement", "threshold", f"None for method={self.method!r}", self.threshold)
        _require(self.threshold is None or not (fractions or self.budget is not None), "threshold",
                 "None where heads, hidden or budget are given", self.threshold)
        _require(is_number(self.regulariser) and self.regulariser >= 0, "regulariser", "a number >= 0", self.regulariser)
        _require(self.regulariser == 0 or self.learned, "regulariser", f"0 for method={self.method!r}, which learns nothing",
                 self.regulariser)

    @property
    def learned(self) -> bool:
        """Whether the choice is made while the model trains."""
        return self.method in ("movement", "gates")

    @property
    def starts_sensitive(self) -> bool:
        """Whether scores start from the sensitivity gathered while nothing is pruned."""
        return self.method == "movement" and self.threshold is None and self.start != "zero"

    def apply(self, model: PrunedViT) -> None:
        """Choose and set the live units of every layer, in place; or, where they are learned, begin to."""
        depth = len(model.blocks)
        for name in ("heads", "hidden"):
            value = getattr(self, name)
            _require(not isinstance(value, tuple) or len(value) == depth, name, f"one fraction, or one for each of {depth} layers", value)
        for i, block in enumerate(model.blocks):
            hidden = block.mlp.fc1.out_features
            _require(hidden % self.granularity == 0, "granularity", f"a divisor of the hidden size {hidden} of block {i}", self.granularity)
            _require(self.head_dim == 1 or isinstance(block.attn.q_norm, torch.nn.Identity), "head_dim",
                     f"1 where queries and keys are normalised, as in block {i}", self.head_dim)
        if self.learned:
            learned.begin(model, self)
            self.choose(model, 1.0)  # what cannot be reached is refused now, not when the schedule gets there
            return
        for block, (heads, hidden, dims) in zip(model.blocks, self.choose(model, 1.0)):
            block.attn.set_live(heads)
            block.attn.set_dims(None if dims is None else dims.to(block.attn.qkv.weight.device))
            block.mlp.set_live(hidden, self.granularity)

    def choose(self, model: PrunedViT, fraction: float) -> list[tuple[list[int], list[int], Tensor | None]]:
        """A layer: live heads, live hidden blocks, and ids of live dimensions ([2, H, K], or None) when `fraction` of the
        pruning has happened."""
        scores = [self._layer_scores(block, i) for i, block in enumerate(model.blocks)]
        if self.budget is not None:
            live = self._by_budget(model, scores, 1 + (self.budget - 1) * fraction)
        elif self.threshold is not None:
            live = [tuple(above(s, self.threshold * fraction) for s in pair[:2]) for pair in scores]
        else:
            live = self._by_fraction(scores, fraction)
        share = 1 + (self.head_dim - 1) * fraction
        return [(*pair, None if dims is None else top_dims(dims, share)) for pair, (_, _, dims) in zip(live, scores)]

    def pressure(self, progress: float) -> float:
        """tau_t / tau_final of the regulariser: of the threshold, of the budget, or of the mean density."""
        if self.threshold is not None:
            return self.schedule.fraction(progress)
        values = [self.budget] if self.budget is not None else [f for v in (self.heads, self.hidden) for f in ([v] if is_number(v) else v)]
        target = max(sum(values) / len(values), 1e-6)
        return self.schedule.density(progress, target) / target

    def _layer_scores(self, block, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        attn, mlp, dims = block.attn, block.mlp, None
        if self.learned:
            dims = None if attn.dim_gate is None else attn.dim_gate.importance()
            return attn.head_gate.importance(), mlp.hidden_gate.importance(), dims
        if self.head_dim < 1 and attn.num_heads:
            dims = self._scores(dim_scores(attn), 1_000_003 + i)
        return self._scores(head_scores(attn), 2 * i), self._scores(hidden_scores(mlp, self.granularity), 2 * i + 1), dims

    def _scores(self, magnitude: Tensor, stream: int) -> Tensor:
        if self.method == "magnitude":
            return magnitude
        generator = torch.Generator("cpu").manual_seed(self.seed * 65537 + stream)
        return torch.rand(magnitude.shape, generator=generator, dtype=torch.float32, device="cpu")

    def _by_fraction(self, scores, fraction: float) -> list[tuple[list[int], list[int]]]:
        def of(value: Fractions, i: int) -> float:
            return 1 + ((value[i] if isinstance(value, tuple) else value) - 1) * fraction

        return [(top(h, of(self.heads, i)), top(f, of(self.hidden, i))) for i, (h, f, _) in enumerate(scores)]

    def _by_budget(self, model: PrunedViT, scores, budget: float) -> list[tuple[list[int], list[int]]]:
        units = []  # (rank, cost, layer, kind, id)
        for i, (block, tokens) in enumerate(zip(model.blocks, tokens_per_block(model))):
            C, D = block.attn.qkv.in_features, block.attn.head_dim
            costs = (4 * tokens * C * D + 2 * tokens * tokens * D, 2 * tokens * C * self.granularity)
            for kind, (values, cost) in enumerate(zip(scores[i], costs)):
                best = int(values.argmax()) if values.numel() else -1
                scale = cost if self.learned else 1  # magnitudes are means, so they are per weight and so per MAC
                units += [(float(s) / scale, cost, i, kind, j) for j, s in enumerate(values) if j != best]
        dead, excess = set(), (1 - budget) * count_macs(model)
        for _, cost, i, kind, j in sorted(units):
            if excess <= 0:
                break
            dead.add((i, kind, j))
            excess -= cost
        _require(excess <= 0, "budget", "reachable with one head and one hidden block in every layer", self.budget)
        return [tuple([j for j in range(s.numel()) if (i, kind, j) not in dead] for kind, s in enumerate(pair[:2]))
                for i, pair in enumerate(scores)]


def _require(condition: bool, argument: str, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"BlockPruning: {argument} must be {expected}, got {got}")


def top(scores: Tensor, fraction: float) -> list[int]:
    """Ascending ids of the int(fraction * n) best scores, at least one unless the fraction is 0; ties to the lower id."""
    n = scores.numel()
    k = 0 if fraction == 0 else min(n, max(1, int(fraction * n + 1e-9)))
    return (-scores).sort(stable=True).indices[:k].sort().values.tolist()


def above(scores: Tensor, threshold: float) -> list[int]:
    """Ascending ids of the scores whose sigmoid exceeds the threshold, the best one in any case."""
    live = scores.sigmoid() > threshold
    return live.nonzero().flatten().tolist() if live.any() or not scores.numel() else [int(scores.argmax())]


def top_dims(scores: Tensor, fraction: float) -> Tensor:
    """Ascending ids of the int(fraction * D) best dimensions of every head, at least one: [2, H, D] -> int64 [2, H, K]."""
    k = max(1, int(fraction * scores.shape[-1] + 1e-9))
    return (-scores).sort(dim=-1, stable=True).indices[..., :k].sort(dim=-1).values


def parse_spec(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """EdgeVisionTransformer's "h_0.5_d_0.4-h_1_d_0.9-..." -> fractions of heads and of hidden units, one a layer."""
    found = [re.fullmatch(r"h_(\d*\.?\d+)_d_(\d*\.?\d+)", part) for part in text.split("-")]
    _require(all(found), "heads", "'h_FRACTION_d_FRACTION' joined by '-'", repr(text))
    return tuple(float(m[1]) for m in found), tuple(float(m[2]) for m in found)


@torch.no_grad()
def dim_scores(attn: PrunedAttention) -> Tensor:
    """Mean square of the weights of each head's dimensions, float32 [2, H, D] on the CPU: q and k, then v and its output."""
    H, D = attn.num_heads, attn.head_dim
    q, k, v = attn.qkv.weight.float().square().mean(1).view(3, H, D)
    proj = attn.proj.weight.float().square().mean(0).view(H, D)
    return (torch.stack([q + k, v + proj]) / 2).cpu()


@torch.no_grad()
def head_scores(attn: PrunedAttention) -> Tensor:
    """Mean square of each head's q, k and v rows and output columns, float32 [H] on the CPU."""
    H, D = attn.num_heads, attn.head_dim
    if H == 0:
        return torch.zeros(0, dtype=torch.float32, device="cpu")
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
