"""Training and evaluation of dense and pruned vision transformers."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from .losses import DynamicViTLoss
from .vit import PrunedDistilledViT, PrunedOutput, PrunedViT

EMBEDDINGS = ("cls_token", "dist_token", "reg_token", "pos_embed")  # what the official recipe never trains


class NonFiniteLoss(FloatingPointError):
    """A loss that is not finite; the message names the first tensor that is not."""


@dataclass(frozen=True)
class TrainConfig:
    """DynamicViT's recipe by default: AdamW, linear warm-up, cosine decay.

    epochs, warmup_epochs, backbone_frozen_epochs: in epochs; lr, min_lr: of the predictors.
    backbone_lr_scale: learning rate of the backbone relative to `lr`; it is 0 in the first `backbone_frozen_epochs`.
    train_embeddings: whether class token and position embedding are trained (official: not).
    clip_grad: largest norm of the gradients of what is being trained; None: no clipping.
    ratio_weight, distill_weight, token_weight: see DynamicViTLoss; the last two count only with a teacher.

    Raises ValueError naming the field that is out of range.
    """
    epochs: int = 30
    batch_size: int = 128
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: int = 5
    weight_decay: float = 0.05
    backbone_lr_scale: float = 0.01
    backbone_frozen_epochs: int = 5
    train_embeddings: bool = False
    clip_grad: float | None = 1.0
    smoothing: float = 0.1
    ratio_weight: float = 2.0
    distill_weight: float = 0.5
    token_weight: float = 0.5
    seed: int = 0

    def __post_init__(self):
        for name, ok, expected in (
                ("epochs", self.epochs >= 1, ">= 1"), ("batch_size", self.batch_size >= 1, ">= 1"),
                ("lr", self.lr > 0, "> 0"), ("min_lr", 0 <= self.min_lr <= self.lr, "in [0, lr]"),
                ("warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, f"in 0..epochs ({self.epochs})"),
                ("weight_decay", self.weight_decay >= 0, ">= 0"),
                ("backbone_lr_scale", self.backbone_lr_scale >= 0, ">= 0"),
                ("backbone_frozen_epochs", self.backbone_frozen_epochs >= 0, ">= 0"),
                ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "> 0 or None"),
                ("smoothing", 0 <= self.smoothing < 1, "in [0, 1)"),
                ("ratio_weight", self.ratio_weight >= 0, ">= 0"),
                ("distill_weight", self.distill_weight >= 0, ">= 0"),
                ("token_weight", self.token_weight >= 0, ">= 0")):
            if not ok:
                raise ValueError(f"TrainConfig: {name} must be {expected}, got {getattr(self, name)}")


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Optimizer groups "backbone" and "predictors", each with and without weight decay (none on vectors and embeddings).

    Every parameter is in exactly one group, but the embeddings where `train_embeddings` is off: they are in none.
    """
    groups: dict[tuple[str, bool], list] = {}
    for name, parameter in model.named_parameters():
        embedding = name in EMBEDDINGS
        if embedding and not config.train_embeddings:
            continue
        kind = "predictors" if name.startswith("score_predictor.") else "backbone"
        groups.setdefault((kind, not embedding and parameter.ndim > 1), []).append(parameter)
    return [{"name": kind, "params": params, "weight_decay": config.weight_decay if decay else 0.0,
             "lr_scale": config.backbone_lr_scale if kind == "backbone" else 1.0}
            for (kind, decay), params in groups.items()]


def train(model: nn.Module, loaders: tuple, config: TrainConfig, teacher: nn.Module | None = None,
          on_epoch: Callable[[dict], None] | None = None) -> list[dict]:
    """Trains `model` in place and returns one record an epoch: epoch, lr, loss, its parts (means over the steps), top1.

    Randomness is a function of `config.seed` and the step; the caller's random state is left as it was.

    Args:
        loaders: (training, held-out); the first has `at_epoch(epoch)`, both yield (images [B, C, H, W], labels [B]).
            The held-out loader may be None; else it is evaluated after the last epoch.
        teacher: dense model with the same classes and grid, in evaluation mode while it teaches; None: no distillation.
        on_epoch: called with each record.

    Raises:
        NonFiniteLoss: naming the first tensor that is not finite.
    """
    training, held_out = loaders
    steps = len(training)
    if steps == 0:
        raise ValueError("train: loaders[0] must yield at least one batch, got none")
    optimizer = create_optimizer_v2(parameter_groups(model, config), opt="adamw", lr=config.lr)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=config.epochs, min_lr=config.min_lr,
                                       warmup_epochs=config.warmup_epochs, warmup_lr=min(1e-6, config.lr),
                                       warmup_prefix=False, step_on_epochs=False, updates_per_epoch=steps)
    criterion = DynamicViTLoss(_ratios(model), config.ratio_weight, config.distill_weight, config.token_weight)
    if teacher is not None:
        teacher.eval()
    history = []
    with torch.random.fork_rng():
        for epoch in range(config.epochs):
            _freeze_backbone(optimizer, epoch < config.backbone_frozen_epochs, config)
            record = _train_epoch(model, training.at_epoch(epoch), config, teacher, criterion, optimizer, scheduler, epoch)
            if held_out is not None and epoch == config.epochs - 1:
                record |= evaluate(model, held_out)
            history.append(record)
            if on_epoch:
                on_epoch(record)
    return history


def _train_epoch(model, loader, config, teacher, criterion, optimizer, scheduler, epoch: int) -> dict:
    model.train()
    device = next(model.parameters()).device
    totals: dict[str, Tensor] = {}
    for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
        images, labels = images.to(device), labels.to(device)
        torch.manual_seed(config.seed * 1_000_003 + step)
        scheduler.step_update(step)
        output = forward(model, images)
        target = soft_target(labels, output.logits.shape[-1], config.smoothing)
        loss, parts = criterion(output, target, None if teacher is None else teach(teacher, images))
        if not torch.isfinite(loss):
            where = first_non_finite(model, images, parts, config.seed * 1_000_003 + step)
            raise NonFiniteLoss(f"train: the loss is {loss.item()} at epoch {epoch}, step {step}; first non-finite: {where}")
        optimizer.zero_grad()
        loss.backward()
        active = [group["params"] for group in optimizer.param_groups if group["lr_scale"] > 0]
        if config.clip_grad is not None:
            nn.utils.clip_grad_norm_([p for group in active for p in group], config.clip_grad)
        optimizer.step()
        for name, value in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0) + value.detach()
    rate = max(group["lr"] for group in optimizer.param_groups)
    return {"epoch": epoch, "lr": rate, **{name: (total / len(loader)).item() for name, total in totals.items()}}


def _ratios(model: nn.Module) -> tuple[float, ...]:
    """Targets of the ratio loss: none where nothing decides (no token pruning, or a score without a predictor)."""
    tokens = getattr(model, "tokens", None)
    return tuple(model.keep_ratios) if tokens is not None and tokens.score == "predictor" else ()


def _freeze_backbone(optimizer, frozen: bool, config: TrainConfig) -> None:
    """A learning rate of 0, as the official code does: AdamW's moments still gather, the weights keep their bits."""
    for group in optimizer.param_groups:
        if group["name"] == "backbone":
            group["lr_scale"] = 0.0 if frozen else config.backbone_lr_scale


def forward(model: nn.Module, images: Tensor) -> PrunedOutput:
    """Images [B, C, H, W] -> PrunedOutput of a pruned or a dense model."""
    if isinstance(model, (PrunedViT, PrunedDistilledViT)):
        return model(images, details=True)
    return PrunedOutput(*_dense(model, images), None, ())


def _dense(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.forward_features(images)  # [B, P+N, C]
    return model.forward_head(tokens), tokens[:, model.num_prefix_tokens:]


def teach(teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, classes] and features [B, N, C] of the dense teacher, as constants."""
    with torch.inference_mode():
        logits, features = _dense(teacher, images)
    return logits.clone(), features.clone()  # out of inference mode: only ordinary tensors can be saved for backward


def soft_target(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels [B] -> probabilities [B, classes]: 1 - smoothing on the label, `smoothing` spread over all classes."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


@torch.no_grad()
def first_non_finite(model: nn.Module, images: Tensor, parts: dict[str, Tensor], seed: int) -> str:
    """Name of the first tensor that is not finite: images, a parameter, a module's output in a replayed forward pass
    with the same `seed`, or a part of the loss."""
    def bad(value) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all()

    if bad(images):
        rows = (~torch.isfinite(images).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        return f"images (rows {rows[:5]} of the batch)"
    for name, parameter in model.named_parameters():
        if bad(parameter):
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str):
        def hook(_module, _inputs, output):
            if not found and any(map(bad, output if isinstance(output, tuple) else [output])):
                found.append(f"output of module {name or 'model'}")
        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        torch.manual_seed(seed)
        forward(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(found + [f"loss part {name}" for name, value in parts.items() if bad(value)]), "the weighted total")


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, seed: int = 0) -> dict:
    """{"top1": percent, "top5": percent, "count": pictures} in evaluation mode; the model's mode is restored.

    `seed` fixes what is random in evaluation: the choice of a model with `score="random"`.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    top1 = top5 = count = 0
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for images, labels in loader:
                labels = labels.to(device)
                logits = model(images.to(device))
                best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]  # [B, 5]
                top1, top5, count = top1 + best[:, 0].sum(), top5 + best.sum(), count + len(labels)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("evaluate: loader must yield at least one picture, got none")
    return {"top1": 100 * int(top1) / count, "top5": 100 * int(top5) / count, "count": count}


class Progress:
    """A progress bar on a terminal, a plain line per step elsewhere; on stderr, so that stdout stays clean.

    """

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(file=sys.stderr)
        self.bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def advance(self, steps: int = 1) -> None:
        self.bar.advance(self.task, steps)

    def say(self, text: str) -> None:
        """What is being done now: the bar's description, or a line of its own."""
        if self.bar.disable:
            print(text, file=sys.stderr, flush=True)
        self.bar.update(self.task, description=text)
