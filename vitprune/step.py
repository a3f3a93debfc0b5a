"""One update of a model in training: objective, learned blocks, mixed precision, gradients, and what an epoch records."""
from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from . import learned
from .evaluate import Later, evaluate, first_non_finite, forward, in_any_process, teach, world
from .losses import DynamicViTLoss
from .split import DroppedGradient

if TYPE_CHECKING:
    from .train import TrainConfig

RETRY = 32  # steps after which a backward pass over kept tokens alone is tried again
EMBEDDINGS = ("cls_token", "dist_token", "reg_token", "pos_embed")  # what the official recipe never trains


class NonFiniteLoss(FloatingPointError):
    """A loss that is not finite; the message names the first tensor that is not."""


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Optimizer groups "backbone", "predictors" and "scores", with and without weight decay (none on vectors, embeddings and scores).

    Every parameter is in exactly one group, but the embeddings where `train_embeddings` is off: they are in none.
    """
    groups: dict[tuple[str, bool], list] = {}
    for name, parameter in model.named_parameters():
        embedding = name in EMBEDDINGS
        if embedding and not config.train_embeddings:
            continue
        kind = "scores" if learned.is_score(name) else "predictors" if name.startswith("score_predictor.") else "backbone"
        decay = not embedding and kind != "scores" and parameter.ndim > 1
        groups.setdefault((kind, decay), []).append(parameter)
    scale = {"backbone": config.backbone_lr_scale, "predictors": 1.0, "scores": config.score_lr / config.lr}
    return [{"name": kind, "params": params, "weight_decay": config.weight_decay if decay else 0.0, "lr_scale": scale[kind]}
            for (kind, decay), params in groups.items()]


class Student(nn.Module):
    """A model whose call is `forward`, so that DistributedDataParallel sees it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sparse_backward: bool | None):
        return forward(self.model, images, sparse_backward)


class Run:
    """A model in training: everything that a step changes, and the step itself."""

    def __init__(self, model: nn.Module, config: TrainConfig, steps: int, teacher: nn.Module | None = None) -> None:
        """steps: of an epoch; teacher: the dense model that distils, or None."""
        self.model, self.config, self.steps, self.teacher = model, config, steps, teacher
        self.device = next(model.parameters()).device
        self.optimizer = create_optimizer_v2(parameter_groups(model, config), opt=config.opt, lr=config.lr)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=config.sched, num_epochs=config.epochs, min_lr=config.min_lr, warmup_epochs=config.warmup_epochs,
            warmup_lr=min(1e-6, config.lr), warmup_prefix=False, step_on_epochs=False, updates_per_epoch=steps)
        self.criterion = DynamicViTLoss(_ratios(model), config.ratio_weight, config.distill_weight, config.token_weight)
        self.ema = None if config.ema is None else ModelEmaV3(model, decay=config.ema)
        self.dtype = _amp(config.amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.student = Student(model)
        self.full = False  # whether gradients of dropped tokens are needed until the next multiple of RETRY
        if world()[1] > 1:
            self.student = nn.parallel.DistributedDataParallel(self.student)
        self.mixup = None
        if config.mixup or config.cutmix:
            if config.batch_size // world()[1] % 2:
                raise ValueError(f"train: batch_size must give each of the {world()[1]} processes an even share for mixup and cutmix, "
                                 f"got {config.batch_size}")
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=model.num_classes)
        self.waits = self.device.type != "cuda"  # for gradients, to know before the update whether they are finite
        self.unchecked: tuple[str, list[Tensor], Later] | None = None  # the last step's place, its parameters, their gradients' norms
        self.totals: dict[str, Tensor] = {}   # sums over the steps of this epoch
        self.history: list[dict] = []         # a record an epoch
        self.corrupt: set[str] = set()        # pictures that could not be read; the loader's own where it counts them

    def state_dict(self) -> dict:
        """What a resumed run needs beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "totals": self.totals,
                "full": self.full, "history": self.history, "corrupt": sorted(self.corrupt), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken. Raises ValueError where an epoch has other steps now: the data have changed."""
        if state["steps"] != self.steps:
            raise ValueError(f"train: the pictures must give {state['steps']} batches an epoch, as when the run began, got {self.steps}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.full = state.get("full", False)
        self.totals = {name: total.to(self.device) for name, total in state["totals"].items()}
        self.history = list(state["history"])
        self.corrupt.update(state["corrupt"])

    def step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """One update, the `step`th of the run, and its loss; its randomness is a function of the seed and of `step`."""
        if step % RETRY == 0:
            self.full = False
        try:
            return self._step(step, images, labels)
        except DroppedGradient:
            if world()[1] > 1:  # other processes wait for this one's gradients
                raise
            if self.config.sparse_backward:
                warnings.warn("train: dropped tokens have gradients that sparse_backward must not leave out; such a step is repeated with "
                              f"all of them, and so are the next ones, up to {RETRY - 1}", stacklevel=2)
        self.full = True
        return self._step(step, images, labels)

    def _step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        config, seed = self.config, self.config.seed * 1_000_003 + step
        sparse = False if self.full or (config.sparse_backward is None and world()[1] > 1) else config.sparse_backward
        progress = step / (config.epochs * self.steps)
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        torch.manual_seed(seed)
        self.model.train()
        frozen = step // self.steps < config.backbone_frozen_epochs
        chosen = self.model_learns and self.model.learning.schedule.fraction(progress) == 1  # what is left is fine-tuned in peace
        for group in self.optimizer.param_groups:  # a rate of 0, as in the official code: AdamW's moments still gather
            if group["name"] == "backbone":
                group["lr_scale"] = 0.0 if frozen else config.backbone_lr_scale
            elif group["name"] == "scores":
                group["lr_scale"] = 0.0 if chosen else config.score_lr / config.lr
        self.scheduler.step_update(step)  # reads the scales
        learned.advance(self.model, progress)
        self.criterion.keep_ratios = _ratios(self.model, progress if config.ramp_tokens else 1.0)
        if self.mixup is not None:
            np.random.seed(seed % 2 ** 32)  # noqa: NPY002 (timm's Mixup draws from it)
            images, target = self.mixup(images.clone(), labels)  # it works in place, and the step may be repeated
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            output = self.student(images, sparse)
            taught = None if self.teacher is None else teach(self.teacher, images)
        if self.mixup is None:
            target = soft_target(labels, output.logits.shape[-1], config.smoothing)
        wide = output._replace(logits=output.logits.float(), features=output.features.float())
        loss, parts = self.criterion(wide, target, None if taught is None else tuple(t.float() for t in taught))
        if self.model_learns:
            parts["penalty"] = learned.penalty(self.model, progress)
            loss = loss + parts["penalty"]
        broken = in_any_process(~torch.isfinite(loss), self.device)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.settle()
        place = f"at epoch {step // self.steps}, step {step}"
        if broken.get():  # asked when a GPU has the backward pass to go on with
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                where = first_non_finite(self.model, images, parts, seed, self.teacher)
            raise NonFiniteLoss(f"train: the loss is {loss.item()} {place}; first non-finite: {where}")
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            self._clip(config.clip_grad, place)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        learned.observe(self.model, progress)
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        kept = {f"keep_{stage}": decision.mean() for stage, decision in enumerate(output.decisions)}
        for name, value in {"loss": loss, **parts, **kept}.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach().float()
        return loss.detach()

    def _clip(self, limit: float, place: str) -> None:
        """Scale gradients to a common norm of at most `limit`; scores sum over whole blocks: their gradients would drown the weights'."""
        groups = (group for group in self.optimizer.param_groups if group["lr_scale"] > 0 and group["name"] != "scores")
        active = [p for group in groups for p in group["params"] if p.grad is not None]
        if not active:
            return
        norms = torch.stack(torch._foreach_norm([p.grad for p in active]))  # one by one: `settle` tells whose is not finite
        norm = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_(active, limit, norm)
        if not self.scaler.is_enabled():  # it skips such a step
            self.unchecked = place, active, Later(torch.cat([norms, norm[None]]))
            if self.waits:
                self.settle()

    def settle(self) -> None:
        """Raise NonFiniteLoss where the last step's gradients, if they were clipped, were not finite. On a GPU that is known after the
        update only, since nothing waits for it: weights are to be used or saved after this."""
        if self.unchecked is None:
            return
        (place, active, norms), self.unchecked = self.unchecked, None
        *finite, whole = torch.isfinite(norms.get()).tolist()
        if whole:
            return
        bad = {p for p, good in zip(active, finite) if not good}  # the same in every process
        where = next((f"norm of the gradient of {name}" for name, p in self.model.named_parameters() if p in bad), "their norm")
        raise NonFiniteLoss(f"train: the gradients are not finite {place}; first non-finite: {where}")

    @property
    def model_learns(self) -> bool:
        """Whether blocks are being learned."""
        return getattr(self.model, "learning", None) is not None

    def average_totals(self) -> None:
        """Make the sums of this epoch those of all processes: every process must call it."""
        if world()[1] > 1:
            for value in self.totals.values():
                dist.all_reduce(value, op=dist.ReduceOp.AVG if self.device.type == "cuda" else dist.ReduceOp.SUM)
                if self.device.type != "cuda":
                    value /= world()[1]

    def _warn_of_sure_stages(self, record: dict) -> None:
        """Of those that keep all or none of what they are given, far from their target."""
        progress = (record["step"] - 1) / (self.config.epochs * self.steps) if self.config.ramp_tokens else 1.0  # of the last step
        given = 1.0
        for stage, target in enumerate(_ratios(self.model, progress)):
            kept = record.get(f"keep_{stage}")  # a run that goes on from a checkpoint without
            if kept is None or given == 0:
                return
            share, given = kept / given, kept
            if (share > 1 - 1e-3 and kept > target + 0.1) or (share < 1e-3 and kept < target - 0.1):
                warnings.warn(f"train: in epoch {record['epoch']} stage {stage} kept {kept:.4f} of the patches, its target is "
                              f"{target:.4f}: its decisions have become too sure to have a gradient; a lower lr or a longer warm-up "
                              "avoids that", stacklevel=3)

    def end_epoch(self, epoch: int, held_out) -> dict:
        """The record of an epoch: its means, and the accuracies where it is time to evaluate. keep_S: of the original patches, what stage
        S kept in training; a warning where it is all or none against its target, since sure decisions have no gradient."""
        self.settle()
        self.average_totals()
        means = {name: total / self.steps for name, total in self.totals.items()}
        lr = next((g["lr"] / g["lr_scale"] for g in self.optimizer.param_groups if g["lr_scale"]), 0.0)  # what config.lr has become
        record = {"epoch": epoch, "step": (epoch + 1) * self.steps, "lr": lr, **{name: value.item() for name, value in means.items()}}
        if self.config.ratio_weight and world()[0] == 0:
            self._warn_of_sure_stages(record)
        if self.corrupt:
            record["unreadable"] = len(self.corrupt)
        last = epoch == self.config.epochs - 1
        if last:
            learned.advance(self.model, 1.0)
        if held_out is not None and (last or (epoch + 1) % self.config.eval_every == 0):
            record |= evaluate(self.model, held_out)
            if self.ema is not None:
                learned.follow(self.ema.module, self.model)
                learned.advance(self.ema.module, (epoch + 1) / self.config.epochs)
                record |= {f"ema_{name}": value for name, value in evaluate(self.ema.module, held_out).items() if name != "count"}
        self.totals = {}
        self.history.append(record)
        return record


def _ratios(model: nn.Module, progress: float = 1.0) -> tuple[float, ...]:
    """Targets of the ratio loss at `progress` of the schedule: none where nothing decides (no predictor)."""
    tokens = getattr(model, "tokens", None)
    if tokens is None or tokens.score != "predictor":
        return ()
    schedule = getattr(getattr(model, "learning", None), "schedule", learned.Cubic())
    fraction = 1.0 if progress == 1.0 else schedule.fraction(progress)
    return tuple(1 + (ratio - 1) * fraction for ratio in model.keep_ratios)


def _amp(name: str, device: torch.device) -> torch.dtype | None:
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return None if name == "off" else getattr(torch, name)


def soft_target(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels [B] -> probabilities [B, classes]: 1 - smoothing on the label, `smoothing` spread over all classes."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
