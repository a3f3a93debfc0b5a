"""Block pruning with learned scores: gates on heads and hidden blocks, the schedule that closes them, and how they settle.

A head's gate multiplies its output before the projection, a hidden block's gate its units after GELU: a closed gate equals
removing query, key, value and projection of a head together, or rows of fc1 with their bias and columns of fc2. The score's
gradient is the gate's: sum of dL/dW * W over the output columns of the unit (movement pruning: Sanh et al., 2020, eq. 3;
in blocks: Lagunas et al., 2021), for closed gates too, so that a dead block can come back while the schedule runs: until it has
ended, dead units are computed as the others, in evaluation too. Then training leaves the scores alone: what was chosen is
fine-tuned and no longer exchanged, and hard gates give way to live units, so that dead ones cost nothing and get no gradient.

Where a model is pruned on the task it was trained for, the mean of that gradient is near zero while nothing is pruned, and the
scores gather noise. They therefore start from its mean square (Molchanov et al., 2019, eq. 8), gathered in the initial warm-up.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .blocks import BlockPruning
    from .vit import PrunedViT

GATES = ("attn.head_gate", "attn.dim_gate", "mlp.hidden_gate")


@dataclass(frozen=True)
class Cubic:
    """When learned blocks leave (nn_pruning's schedule): nothing in the first `initial` of the training, everything asked
    for in the last `final` of it, and in between 1 - (1 - x)^3 of it, x going from 0 to 1.

    Raises ValueError for fractions that leave nothing in between.
    """
    initial: float = 0.1
    final: float = 0.3

    def __post_init__(self) -> None:
        if not (0 <= self.initial and 0 <= self.final and self.initial + self.final < 1):
            raise ValueError(f"Cubic: initial and final must be >= 0 and together < 1, got {self.initial} and {self.final}")

    def fraction(self, progress: float) -> float:
        """How much of the pruning has happened at `progress` of the training, both in [0, 1]."""
        x = (progress - self.initial) / (1 - self.initial - self.final)
        return 1 - (1 - min(1.0, max(0.0, x))) ** 3

    def density(self, progress: float, target: float) -> float:
        """What is kept at `progress` where `target` is kept in the end."""
        return 1 + (target - 1) * self.fraction(progress)


class Gate(nn.Module):
    """What multiplies units whose score is learned: score and mask in the same shape.

    soft=False, movement pruning: the mask, straight through to the score. soft=True: the score where the mask is 1, 0
    elsewhere. The gradient of the score is that of the output, whatever the mask.
    """

    def __init__(self, like: Tensor, soft: bool) -> None:
        super().__init__()
        self.soft = soft
        self.score = nn.Parameter(torch.full_like(like, float(soft)))
        self.register_buffer("mask", torch.ones_like(like), persistent=False)
        self.register_buffer("sensitivity", torch.zeros_like(like, dtype=torch.float32))  # sum of squared gradients so far

    def forward(self) -> Tensor:
        if self.soft:
            return self.score * self.mask + (self.score - self.score.detach()) * (1 - self.mask)
        return self.mask + (self.score - self.score.detach())

    def importance(self) -> Tensor:
        """By what the units are ranked, float32 on the CPU."""
        score = self.score.detach().float().cpu()
        return score.abs() if self.soft else score

    def penalty(self) -> Tensor:
        """Mean of sigmoid(score), or of |score| for soft gates (Zhu et al., VTP, 2021, eq. 3)."""
        return self.score.abs().mean() if self.soft else self.score.sigmoid().mean()


def is_score(name: str) -> bool:
    """Whether a parameter of that name is a learned score, for parameter groups: own learning rate, no weight decay."""
    return name.endswith("_gate.score")


def gates(model: nn.Module) -> list[Gate]:
    """The gates of a model that learns its blocks."""
    return [m for m in model.modules() if isinstance(m, Gate)]


def begin(model: PrunedViT, blocks: BlockPruning) -> None:
    """Open a gate on every unit that `blocks` may drop, in place."""
    model.learning, soft = blocks, blocks.method == "gates"
    for block in model.blocks:
        attn, mlp, like = block.attn, block.mlp, block.attn.qkv.weight.detach()
        attn.set_live(None)
        attn.set_dims(None)
        mlp.set_live(None)
        mlp.width = blocks.granularity
        attn.head_gate = Gate(like.new_empty(attn.num_heads), soft)
        attn.dim_gate = Gate(like.new_empty(2, attn.num_heads, attn.head_dim), soft) if blocks.head_dim < 1 else None
        mlp.hidden_gate = Gate(like.new_empty(mlp.fc1.out_features // blocks.granularity), soft)


def advance(model: PrunedViT, progress: float) -> None:
    """Close gates as the schedule asks at `progress` in [0, 1] of the training, in place; nothing where none is learned."""
    if getattr(model, "learning", None) is None:
        return
    fraction = model.learning.schedule.fraction(progress)
    for block, (heads, hidden, dims) in zip(model.blocks, model.learning.choose(model, fraction)):
        _close(block.attn.head_gate, heads)
        _close(block.mlp.hidden_gate, hidden)
        chosen = fraction == 1 and dims is None and not block.attn.head_gate.soft
        block.attn.set_live(heads if chosen else None)
        block.mlp.set_live(hidden if chosen else None, model.learning.granularity)
        if dims is not None:
            block.attn.dim_gate.mask.zero_().scatter_(-1, dims.to(block.attn.qkv.weight.device), 1.0)


@torch.no_grad()
def observe(model: PrunedViT, progress: float) -> None:
    """After a step at `progress` of the training: while nothing is pruned, the scores that start from the sensitivity of the
    loss to their gates are its mean square so far, in units of its mean over the model. What is not finite counts nothing."""
    blocks = getattr(model, "learning", None)
    if blocks is None or not blocks.starts_sensitive or blocks.schedule.fraction(progress) > 0:
        return
    for gate in gates(model):
        gate.sensitivity += gate.score.grad.float().square().nan_to_num(0, 0, 0)
    mean = torch.cat([gate.sensitivity.flatten() for gate in gates(model)]).mean()
    for gate in gates(model):
        gate.score.copy_(gate.sensitivity / mean.clamp(min=torch.finfo(torch.float32).tiny))


@torch.no_grad()
def follow(average: PrunedViT, model: PrunedViT) -> None:
    """Give a moving average of `model` its scores, in place: it keeps what was fine-tuned, not what averaged scores would choose."""
    for mine, theirs in zip(gates(average), gates(model)):
        mine.score.copy_(theirs.score)


def _close(gate: Gate, live: list[int]) -> None:
    mask = torch.zeros(gate.mask.shape)
    mask[live] = 1
    gate.mask.copy_(mask)


def penalty(model: PrunedViT, progress: float) -> Tensor:
    """What the regulariser adds to the loss at `progress`: lambda_t / kinds * sum over kinds of the mean over layers.

    lambda_t = regulariser * tau_t / tau_final, tau being the density or, with `threshold`, the threshold. Where lambda is 0 too
    every score is in it, and has a gradient: DistributedDataParallel waits for those of all parameters.
    """
    blocks, found = getattr(model, "learning", None), gates(model)
    if blocks is None or not found:
        return next(model.parameters()).new_zeros(())
    kinds: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            kinds.setdefault(name.rsplit(".", 1)[-1], []).append(module.penalty())
    mean = torch.stack([torch.stack(parts).mean() for parts in kinds.values()]).mean()
    return blocks.regulariser * blocks.pressure(progress) * mean


@torch.no_grad()
def settle(model: PrunedViT) -> None:
    """End the learning, in place: gates as the finished schedule leaves them become live units, soft ones fold into the
    weights after them, scores are gone. The outputs stay the same. Nothing where none is learned."""
    if getattr(model, "learning", None) is None:
        return
    advance(model, 1.0)
    for block, (heads, hidden, dims) in zip(model.blocks, model.learning.choose(model, 1.0)):
        attn, mlp = block.attn, block.mlp
        if attn.head_gate.soft:
            attn.proj.weight.mul_(attn.head_gate().repeat_interleave(attn.head_dim))
            mlp.fc2.weight.mul_(mlp.hidden_gate().repeat_interleave(mlp.width))
            if dims is not None:
                qk, v = attn.dim_gate().flatten(1)
                attn.proj.weight.mul_(v)
                attn.qkv.weight[:qk.numel()].mul_(qk[:, None])
                if attn.qkv.bias is not None:
                    attn.qkv.bias[:qk.numel()].mul_(qk)
        attn.head_gate = attn.dim_gate = mlp.hidden_gate = None
        attn.set_live(heads)
        attn.set_dims(None if dims is None else dims.to(attn.qkv.weight.device))
        mlp.set_live(hidden, model.learning.granularity)
    model.learning = None


@torch.no_grad()
def refill(model: PrunedViT, generator: torch.Generator | None = None) -> None:
    """Revive the dead dimensions of the heads that remain, in place, to fine-tune them ("hybrid-filled", Lagunas et al., 2021).

    Their weights are drawn around the mean of those that live, with a hundredth of their deviation. Raises ValueError for a
    model that is still learning its blocks.
    """
    if getattr(model, "learning", None) is not None:
        raise ValueError("refill: the model must have settled which blocks it keeps (vitprune.learned.settle), it is still learning them")
    for block in model.blocks:
        attn, dims = block.attn, block.attn.dims
        if dims is None:
            continue
        qk, v = torch.zeros(2, attn.num_heads, attn.head_dim, device=dims.device).scatter(-1, dims, 1.0).bool().flatten(1)
        for weight, live in ((attn.qkv.weight, torch.cat([qk, qk, v])), (attn.proj.weight.t(), v)):
            std, mean = torch.std_mean(weight[live])
            noise = torch.randn(weight[~live].shape, generator=generator).to(weight)
            weight[~live] = mean + 0.01 * std * noise
        attn.set_dims(None)
