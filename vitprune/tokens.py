"""Token pruning: keep schedule, predictor and the straight-through policy of DynamicViT (Rao et al., 2021)."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from timm.layers import trunc_normal_
from torch import Tensor, nn

SCHEDULES = ("geometric", "subtractive")
SCORES = ("predictor", "cls_attention", "random")


@dataclass(frozen=True)
class TokenPruning:
    """Which patches a vision transformer keeps, and where.

    keep: base rate b in (0, 1]: stage s keeps b^(s+1) of the original patches ("geometric", the official DeiT models) or
        b - 0.2 s ("subtractive"); or one entry a stage: a float is a ratio of the original patches (count int(N r)),
        an int a count.
    at: blocks (0-based) before which patches are dropped.
    score: "predictor" (learned, DynamicViT), "cls_attention" (what the class token attends in the block before, mean
        over heads; nothing to train) or "random" (the control). The last two drop tokens in training as in evaluation.
    multiple_of: round patches plus prefix tokens to the nearest multiple, for kernels that like round shapes.
    threshold: adaptive counts: in evaluation each image keeps the patches whose probability exceeds it, at least min_keep.
    min_keep: a stage that would keep fewer patches is an error.

    Raises ValueError for values that no model could serve.
    """
    keep: float | Sequence[int | float]
    at: tuple[int, ...] = (3, 6, 9)
    schedule: str = "geometric"
    score: str = "predictor"
    multiple_of: int | None = None
    threshold: float | None = None
    min_keep: int = 1

    def __post_init__(self) -> None:
        for name, value, scalar in (("keep", self.keep, True), ("at", self.at, False)):
            if isinstance(value, (list, tuple, range)):
                object.__setattr__(self, name, tuple(value))
            else:
                expected = "a number or a sequence" if scalar else "a sequence of block numbers"
                _require(scalar and is_number(value), name, expected, repr(value))
        if isinstance(self.keep, tuple):
            _require(all(map(is_number, self.keep)), "keep", "numbers", self.keep)
        for name in ("multiple_of", "min_keep"):
            value = getattr(self, name)
            _require(is_int(value) or (value is None and name == "multiple_of"), name, "an int", repr(value))
        _require(self.threshold is None or is_number(self.threshold), "threshold", "None or a number", repr(self.threshold))
        _require(self.schedule in SCHEDULES, "schedule", f"one of {SCHEDULES}", self.schedule)
        _require(self.score in SCORES, "score", f"one of {SCORES}", self.score)
        _require(bool(self.at) and all(is_int(i) and i >= 0 for i in self.at) and
                 list(self.at) == sorted(set(self.at)), "at", "ascending block numbers >= 0, each once", self.at)
        _require(self.score != "cls_attention" or self.at[0] > 0, "at",
                 "> 0 for cls_attention, which reads the block before", self.at)
        _require(self.multiple_of is None or self.multiple_of >= 1, "multiple_of", "None or >= 1", self.multiple_of)
        _require(self.min_keep >= 0, "min_keep", ">= 0", self.min_keep)
        _require(self.threshold is None or 0 <= self.threshold < 1, "threshold", "None or in [0, 1)", self.threshold)
        _require(self.threshold is None or self.score == "predictor", "threshold",
                 "None unless score='predictor', the only score that is a probability", self.threshold)
        if isinstance(self.keep, tuple):
            _require(len(self.keep) == len(self.at), "keep",
                     f"a base rate in (0, 1] or one entry for each of the {len(self.at)} stages", self.keep)
            for s, r in enumerate(self.keep):
                ok = r >= 0 if isinstance(r, int) else 0 <= r <= 1
                _require(ok, f"keep of stage {s}", "a ratio in [0, 1] or a count >= 0", r)
                if s and type(r) is type(self.keep[s - 1]):
                    _require(r <= self.keep[s - 1], f"keep of stage {s}", f"at most the stage before, {self.keep[s - 1]}", r)
        else:
            _require(0 < self.keep <= 1, "keep", "in (0, 1]", self.keep)
            for s, r in enumerate(self._entries()):
                _require(r > -1e-9, f"keep of stage {s}", f">= 0 (base rate {self.keep}, {self.schedule})", round(r, 6))

    def _entries(self) -> tuple[float | int, ...]:
        if isinstance(self.keep, tuple):
            return self.keep
        stages = range(len(self.at))
        if self.schedule == "geometric":
            return tuple(self.keep ** (s + 1) for s in stages)
        return tuple(self.keep - 0.2 * s for s in stages)

    def counts(self, num_patches: int, prefix: int) -> list[int]:
        """Patches kept after each stage; raises ValueError naming the stage that keeps too few or too many."""
        num_patches = int(num_patches)  # torch.jit.trace hands sizes as tensors, whose products round in float32
        counts, before = [], num_patches
        for s, r in enumerate(self._entries()):
            k = r if isinstance(r, int) and isinstance(self.keep, tuple) else max(0, int(num_patches * r))
            if k > before:
                self._refuse(s, f"at most the {before} patches there are", k)
            if self.multiple_of:
                k = min(before, math.floor((k + prefix) / self.multiple_of + 0.5) * self.multiple_of - prefix)
            if k < self.min_keep:
                self._refuse(s, f"at least min_keep={self.min_keep} of {num_patches} patches", max(k, 0))
            counts.append(k)
            before = k
        return counts

    def _refuse(self, stage: int, expected: str, got: int) -> NoReturn:
        raise ValueError(f"TokenPruning: keep of stage {stage} (before block {self.at[stage]}) must be {expected}, got {got}")

    def ratios(self, num_patches: int) -> list[float]:
        """Target keep ratio of each stage, relative to the original patches, for the ratio loss."""
        return [r / num_patches if isinstance(r, int) and isinstance(self.keep, tuple) else float(r) for r in self._entries()]


def is_number(value) -> bool:
    """Whether value is an int or a float; a bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_int(value) -> bool:
    """Whether value is an int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, argument: str, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"TokenPruning: {argument} must be {expected}, got {got}")


class TokenPredictor(nn.Module):
    """DynamicViT's predictor (section 3.2, eq. 1-5) in the official checkpoint's layout.

    patches [B, N, C] and policy [B, N] (None: all kept) -> log-probabilities [B, N, 2], channel 0 = keep.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"TokenPredictor: dim must be a multiple of 4, got {dim}")
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
                                      nn.Linear(dim // 4, 2), nn.LogSoftmax(dim=-1))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, patches: Tensor, policy: Tensor | None = None) -> Tensor:
        x = self.in_conv(patches)
        local, shared = x.chunk(2, dim=-1)
        if policy is None:
            shared = shared.sum(1, keepdim=True) / max(patches.shape[1], 1)
        else:  # the clamp: an image that has lost every token gives zero instead of NaN
            weight = policy[..., None].to(x.dtype)
            shared = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1e-6)
        return self.out_conv(torch.cat([local, shared.expand_as(local)], dim=-1))


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of `like` [B, ...]; in a distributed run that of this process's part of the batch,
    so that a picture's noise does not depend on the number of processes that share a seed."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    noise = like.new_empty(size * like.shape[0], *like.shape[1:]).exponential_()
    return -noise[rank * like.shape[0]:(rank + 1) * like.shape[0]].log()


def sample_policy(logp: Tensor, previous: Tensor | None) -> Tensor:
    """A hard, straight-through keep decision (Gumbel-softmax, tau = 1): logp [B, N, 2] -> {0, 1} [B, N].

    Tokens dropped before stay dropped. The gradient is that of the soft sample.
    """
    noisy = logp + gumbel_noise(logp)
    soft = noisy.softmax(-1)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).to(soft.dtype)
    decision = hard + (soft - soft.detach())
    return decision if previous is None else decision * previous
