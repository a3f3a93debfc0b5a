"""The DynamicViT objective (Rao et al., NeurIPS 2021): classification, keep ratio, and distillation from the dense model."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn


def ratio_loss(decisions: Sequence[Tensor], keep_ratios: Sequence[float]) -> Tensor:
    """(1/S) sum_s mean_b (mean_n D_s[b, n] - r_s)^2, for decisions D_s [B, N] in {0, 1} and S stages."""
    if len(decisions) != len(keep_ratios):
        raise ValueError(f"ratio_loss: decisions must have one entry per keep ratio ({len(keep_ratios)}), "
                         f"got {len(decisions)}")
    per_stage = [(decision.mean(dim=1) - ratio).square().mean()
                 for decision, ratio in zip(decisions, keep_ratios)]
    return torch.stack(per_stage).mean()


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the class distributions at temperature 1, mean over the batch; logits [B, classes]."""
    return F.kl_div(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), reduction="batchmean",
                    log_target=True)


def token_loss(student: Tensor, teacher: Tensor, keep: Tensor | None) -> Tensor:
    """Mean squared error of features over the tokens that `keep` [B, N] keeps (None: all); 0 if none is kept.

    `student` is [B, N, C], or [B, K, C] where the others have left (ascending ids); `teacher` is [B, N, C].
    Equal to `mse_loss(student[keep], teacher[keep])`, without indexing by data, so without waiting for the device.
    """
    if keep is None:
        return F.mse_loss(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        ids = keep.sort(dim=1, descending=True, stable=True).indices[:, :student.shape[1]]  # [B, K]
        teacher = teacher.gather(1, ids[..., None].expand_as(student))
        keep = keep.gather(1, ids)
    kept = keep > 0.5
    squared = (student - teacher).square().mean(dim=-1)  # [B, N] or [B, K]
    return torch.where(kept, squared, 0.0).sum() / mean_over_processes(kept.sum()).clamp(min=1)


def mean_over_processes(count: Tensor) -> Tensor:
    """A count, averaged over the processes of a distributed run, so that the mean of their losses is that of one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    count = count.float()
    dist.all_reduce(count)
    return count / dist.get_world_size()


class DynamicViTLoss(nn.Module):
    """CE + ratio_weight * ratio + distill_weight * KL + token_weight * token MSE.

    Args:
        keep_ratios: fraction of the original patches each stage keeps; empty for a model that drops none.
        criterion: classification loss of (logits [B, classes], target); soft targets [B, classes] by default.
    """

    def __init__(self, keep_ratios: Sequence[float], ratio_weight: float = 2.0, distill_weight: float = 0.5,
                 token_weight: float = 0.5, criterion: Callable[[Tensor, Tensor], Tensor] | None = None):
        super().__init__()
        self.keep_ratios = tuple(keep_ratios)
        self.ratio_weight, self.distill_weight, self.token_weight = ratio_weight, distill_weight, token_weight
        self.criterion = criterion or SoftTargetCrossEntropy()

    def forward(self, output, target: Tensor, teacher: tuple[Tensor, Tensor] | None = None):
        """(total, parts): `parts` maps classification, ratio, distillation and tokens to their unweighted scalars.

        Args:
            output: PrunedOutput of the student in training mode.
            target: what `criterion` takes.
            teacher: logits [B, classes] and features after the final norm [B, N, C] of the dense model, or None.
        """
        parts = {"classification": self.criterion(output.logits, target)}
        total = parts["classification"]
        if self.keep_ratios:
            parts["ratio"] = ratio_loss(output.decisions, self.keep_ratios)
            total = total + self.ratio_weight * parts["ratio"]
        if teacher is not None:
            logits, features = teacher
            parts["distillation"] = distillation_loss(output.logits, logits)
            total = total + self.distill_weight * parts["distillation"]
            if self.token_weight:  # without, the teacher may be of another width or grid
                parts["tokens"] = token_loss(output.features, features, output.keep)
                total = total + self.token_weight * parts["tokens"]
        return total, parts
