"""Training of dense and pruned vision transformers: DynamicViT's objective, learned blocks, and both in tandem."""
from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass

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
from .blocks import Cubic
from .evaluate import evaluate, first_non_finite, forward, teach, world
from .losses import DynamicViTLoss

EMBEDDINGS = ("cls_token", "dist_token", "reg_token", "pos_embed")  # what the official recipe never trains
AMP = ("auto", "off", "bfloat16", "float16")


class NonFiniteLoss(FloatingPointError):
    """A loss that is not finite; the message names the first tensor that is not."""


class Stopped(RuntimeError):
    """The run was asked to stop by `signal`, and has saved what it had."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.signal = number


@dataclass(frozen=True)
class TrainConfig:
    """DynamicViT's recipe by default: AdamW, linear warm-up, cosine decay.

    epochs, warmup_epochs, backbone_frozen_epochs: in epochs; lr, min_lr: of the predictors. batch_size: over all processes.
    opt, sched: timm's names. backbone_lr_scale: learning rate of the backbone relative to `lr`; it is 0 in the first
        `backbone_frozen_epochs`. score_lr: of learned block scores, which follow the same schedule without weight decay.
    train_embeddings: whether class token and position embedding are trained (official: not).
    clip_grad: largest norm of the gradients of what is being trained; None: no clipping.
    ratio_weight, distill_weight, token_weight: see DynamicViTLoss; the last two count only with a teacher.
    ramp_tokens: the keep ratios move from 1 to their targets along the schedule of the blocks (tandem).
    mixup, cutmix: alphas of timm's Mixup, 0: off. ema: decay of a moving average of the weights, evaluated beside them.
    amp: "auto" (on a GPU bfloat16 where the hardware has it, else float16 with scaled gradients; off on a CPU) or a dtype.
    eval_every: epochs between evaluations; the last one always ends with one.

    Raises ValueError naming the field that is out of range.
    """
    epochs: int = 30
    batch_size: int = 128
    opt: str = "adamw"
    sched: str = "cosine"
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: int = 5
    weight_decay: float = 0.05
    backbone_lr_scale: float = 0.01
    backbone_frozen_epochs: int = 5
    score_lr: float = 1e-2
    train_embeddings: bool = False
    clip_grad: float | None = 1.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    ratio_weight: float = 2.0
    distill_weight: float = 0.5
    token_weight: float = 0.5
    ramp_tokens: bool = False
    ema: float | None = None
    amp: str = "auto"
    eval_every: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, ok, expected in (
                ("epochs", self.epochs >= 1, ">= 1"), ("batch_size", self.batch_size >= 1, ">= 1"),
                ("lr", self.lr > 0, "> 0"), ("min_lr", 0 <= self.min_lr <= self.lr, "in [0, lr]"),
                ("warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, f"in 0..epochs ({self.epochs})"),
                ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "> 0 or None"),
                ("smoothing", 0 <= self.smoothing < 1, "in [0, 1)"), ("amp", self.amp in AMP, f"one of {AMP}"),
                ("ema", self.ema is None or 0 < self.ema < 1, "None or in (0, 1)"), ("eval_every", self.eval_every >= 1, ">= 1"),
                ("mixup", self.mixup == self.cutmix == 0 or self.batch_size % 2 == 0, "0 where batch_size is odd"),
                *((name, getattr(self, name) >= 0, ">= 0") for name in (
                    "weight_decay", "backbone_lr_scale", "backbone_frozen_epochs", "score_lr", "mixup", "cutmix", "ratio_weight",
                    "distill_weight", "token_weight"))):
            if not ok:
                raise ValueError(f"TrainConfig: {name} must be {expected}, got {getattr(self, name)}")


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

    def forward(self, images: Tensor):
        return forward(self.model, images)


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
        if world()[1] > 1:
            self.student = nn.parallel.DistributedDataParallel(self.student)
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=model.num_classes)
        self.totals: dict[str, Tensor] = {}   # sums over the steps of this epoch
        self.history: list[dict] = []         # a record an epoch

    def state_dict(self) -> dict:
        """What a resumed run needs beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "totals": self.totals,
                "history": self.history}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.totals = {name: total.to(self.device) for name, total in state["totals"].items()}
        self.history = list(state["history"])

    def step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """One update, the `step`th of the run, and its loss; its randomness is a function of the seed and of `step`."""
        config, seed = self.config, self.config.seed * 1_000_003 + step
        progress = step / (config.epochs * self.steps)
        images, labels = images.to(self.device), labels.to(self.device)
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
            images, target = self.mixup(images, labels)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            output = self.student(images)
            taught = None if self.teacher is None else teach(self.teacher, images)
        if self.mixup is None:
            target = soft_target(labels, output.logits.shape[-1], config.smoothing)
        wide = output._replace(logits=output.logits.float(), features=output.features.float())
        loss, parts = self.criterion(wide, target, None if taught is None else tuple(t.float() for t in taught))
        if self.model_learns:
            parts["penalty"] = learned.penalty(self.model, progress)
            loss = loss + parts["penalty"]
        if _any(not torch.isfinite(loss), self.device):
            where = first_non_finite(self.model, images, parts, seed)
            raise NonFiniteLoss(f"train: the loss is {loss.item()} at epoch {step // self.steps}, step {step}; first non-finite: {where}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            active = [p for group in self.optimizer.param_groups if group["lr_scale"] > 0 and group["name"] != "scores"
                      for p in group["params"]]  # scores sum over whole blocks: their gradients would drown the weights'
            norm = nn.utils.clip_grad_norm_(active, config.clip_grad)
            if not self.scaler.is_enabled() and not torch.isfinite(norm):  # the same in every process; the scaler skips such a step
                named = ((n, p) for n, p in self.model.named_parameters() if p.grad is not None and any(p is a for a in active))
                where = next((n for n, p in named if not torch.isfinite(p.grad).all()), "their norm")
                raise NonFiniteLoss(f"train: the gradients are not finite at epoch {step // self.steps}, step {step}, "
                                    f"where the loss is {loss.item()}; first non-finite: gradient of {where}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        for name, value in {"loss": loss, **parts}.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach().float()
        return loss.detach()

    @property
    def model_learns(self) -> bool:
        """Whether blocks are being learned."""
        return getattr(self.model, "learning", None) is not None

    def end_epoch(self, epoch: int, held_out) -> dict:
        """The record of an epoch: its means, and the accuracies where it is time to evaluate."""
        means = {name: total / self.steps for name, total in self.totals.items()}
        if world()[1] > 1:
            for value in means.values():
                dist.all_reduce(value, op=dist.ReduceOp.AVG if self.device.type == "cuda" else dist.ReduceOp.SUM)
                if self.device.type != "cuda":
                    value /= world()[1]
        record = {"epoch": epoch, "step": (epoch + 1) * self.steps, "lr": max(g["lr"] for g in self.optimizer.param_groups),
                  **{name: value.item() for name, value in means.items()}}
        last = epoch == self.config.epochs - 1
        if last:
            learned.advance(self.model, 1.0)
        if held_out is not None and (last or (epoch + 1) % self.config.eval_every == 0):
            record |= evaluate(self.model, held_out)
            if self.ema is not None:
                learned.advance(self.ema.module, (epoch + 1) / self.config.epochs)
                record |= {f"ema_{name}": value for name, value in evaluate(self.ema.module, held_out).items() if name != "count"}
        self.totals = {}
        self.history.append(record)
        return record


def train(model: nn.Module, loaders: tuple, config: TrainConfig, teacher: nn.Module | None = None,
          on_epoch: Callable[[dict], None] | None = None, checkpoints=None, on_step: Callable[[int, Tensor], None] | None = None,
          on_history: Callable[[list[dict]], None] | None = None) -> list[dict]:
    """Trains `model` in place and returns one record an epoch: epoch, step, lr, loss, its parts (means over the steps), top1, ...

    Randomness is a function of `config.seed` and the step; the caller's random state is left as it was. A model that learns
    its blocks is left with its gates as the finished schedule leaves them (`learned.settle` and `compact` end the learning).
    Under torch.distributed each process trains on its part of every batch; dropout, stochastic depth and mixup then differ
    from those of a single process, all else is equal to it.

    Args:
        loaders: (training, held-out); the first has `at_epoch(epoch, start=0)`, both yield (images [B, C, H, W], labels [B]).
            The held-out loader may be None.
        teacher: dense model with the same classes and grid, in evaluation mode while it teaches; None: no distillation.
        on_epoch: called with each record; on_step: with the number of steps done and the loss of this process's part;
        on_history: with all records, those of the run that is resumed included, at the beginning and after each epoch.
        checkpoints: `resume.Checkpoints` to continue from and to save to, or None.

    Raises:
        NonFiniteLoss: naming the first tensor that is not finite.
        Stopped: after SIGTERM or SIGINT, where there are checkpoints, with everything saved.
    """
    training, held_out = loaders
    steps = len(training)
    if steps == 0:
        raise ValueError("train: loaders[0] must yield at least one batch, got none")
    if teacher is not None:
        teacher.eval()
    with torch.random.fork_rng(), _numpy_state(), _signals(checkpoints is not None) as asked:
        run = Run(model, config, steps, teacher)
        done = 0 if checkpoints is None else checkpoints.resume(run)

        def stop_if_asked(save: bool = True) -> None:
            if checkpoints is None or not _any(bool(asked), run.device):
                return
            if save:
                checkpoints.save(run, done)
            number = asked[0] if asked else signal.SIGTERM
            raise Stopped(f"train: stopped by {signal.Signals(number).name} after step {done} of {config.epochs * steps}; "
                          f"saved in {checkpoints.folder}: the same command continues", number)

        if on_history:
            on_history(run.history)
        for epoch in range(len(run.history), config.epochs):  # not done // steps: the last stop may have been before an evaluation
            for images, labels in training.at_epoch(epoch, done - epoch * steps):
                loss = run.step(done, images, labels)
                done += 1
                if on_step:
                    on_step(done, loss)
                stop_if_asked()
                if checkpoints is not None and checkpoints.every and done % checkpoints.every == 0 and done % steps:
                    checkpoints.save(run, done)
            if done != (epoch + 1) * steps:
                raise RuntimeError(f"train: loaders[0] must yield len() = {steps} batches an epoch, got {done - epoch * steps}")
            watched = held_out if world()[1] > 1 or held_out is None else _watch(held_out, stop_if_asked)
            record = run.end_epoch(epoch, watched)
            if checkpoints is not None:
                checkpoints.save(run, done)
            if on_history:
                on_history(run.history)
            if on_epoch:
                on_epoch(record)
            stop_if_asked(save=False)
    if run.ema is not None:
        model.load_state_dict(run.ema.module.state_dict())
        learned.advance(model, 1.0)
    return run.history


class _watch:  # noqa: N801 (a function that may be iterated again)
    """The batches of a loader, each preceded by a call."""

    def __init__(self, loader, call: Callable[[], None]) -> None:
        self.loader, self.call = loader, call

    def __iter__(self):
        for batch in self.loader:
            self.call()
            yield batch


def _ratios(model: nn.Module, progress: float = 1.0) -> tuple[float, ...]:
    """Targets of the ratio loss at `progress` of the schedule: none where nothing decides (no predictor)."""
    tokens = getattr(model, "tokens", None)
    if tokens is None or tokens.score != "predictor":
        return ()
    schedule = getattr(getattr(model, "learning", None), "schedule", Cubic())
    fraction = 1.0 if progress == 1.0 else schedule.fraction(progress)
    return tuple(1 + (ratio - 1) * fraction for ratio in model.keep_ratios)


def _amp(name: str, device: torch.device) -> torch.dtype | None:
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return None if name == "off" else getattr(torch, name)


def _any(flag, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if world()[1] == 1:
        return bool(flag)
    shared = torch.tensor(float(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared)


@contextlib.contextmanager
def _numpy_state():
    state = np.random.get_state()  # noqa: NPY002 (timm's Mixup draws from it)
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002 (timm's Mixup draws from it)


@contextlib.contextmanager
def _signals(catch: bool):
    """A list that SIGTERM and SIGINT are added to while it lasts; a second one acts as always."""
    asked: list[int] = []
    previous = {}

    def handle(number, frame):
        asked.append(number)
        signal.signal(number, previous[number])

    try:
        if catch:
            for number in (signal.SIGTERM, signal.SIGINT):
                with contextlib.suppress(ValueError):  # only the main thread may
                    previous[number] = signal.signal(number, handle)
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def soft_target(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels [B] -> probabilities [B, classes]: 1 - smoothing on the label, `smoothing` spread over all classes."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
