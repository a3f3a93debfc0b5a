"""Training of dense and pruned vision transformers: DynamicViT's objective, learned blocks, and both in tandem."""
from __future__ import annotations

import contextlib
import ctypes
import platform
import signal
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from timm.optim import get_optimizer_info
from torch import Tensor, nn

from . import learned
from .evaluate import in_any_process, world
from .step import Run

AMP = ("auto", "off", "bfloat16", "float16")
SCHEDS = ("cosine", "tanh", "poly")


class Stopped(RuntimeError):
    """The run was asked to stop by `signal`, and has saved what it had."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.signal = number


def keep_memory() -> None:
    """Let malloc keep, for the whole process, what a step on a CPU frees, where it is glibc's: the kernel otherwise takes the
    activations back and zeroes them anew in every step: of DeiT-S at batch 32 that was a hundredth to a fifth of the time, by machine."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: no mapping of its own for a large tensor; M_TRIM_THRESHOLD: never
            ctypes.CDLL(None).mallopt(option, value)


def _is_optimizer(name: str) -> bool:
    try:
        return bool(get_optimizer_info(name.lower().rpartition("lookahead_")[2]))
    except ValueError:
        return False


@dataclass(frozen=True)
class TrainConfig:
    """DynamicViT's recipe by default: AdamW, linear warm-up, cosine decay.

    epochs, warmup_epochs, backbone_frozen_epochs: in epochs; lr, min_lr: of the predictors. batch_size: over all processes.
    opt, sched: timm's names, of schedules those that need neither a measurement nor steps of their own.
    backbone_lr_scale: learning rate of the backbone relative to `lr`; it is 0 in the first `backbone_frozen_epochs`.
    score_lr: of learned block scores, which follow the same schedule without weight decay; where they start from the sensitivity, whose
        mean is 1, about 0.3 / (steps while blocks leave) did best.
    train_embeddings: whether class token and position embedding are trained (official: not).
    clip_grad: largest norm of the gradients of what is being trained; None: no clipping.
    ratio_weight, distill_weight, token_weight: see DynamicViTLoss; the last two count only with a teacher.
    ramp_tokens: the keep ratios move from 1 to their targets along the schedule of the blocks (tandem).
    mixup, cutmix: alphas of timm's Mixup, 0: off. ema: decay of a moving average of the weights, evaluated beside them;
        with one, the average is what is saved as the model, and chooses the best checkpoint.
    amp: "auto" (on a GPU bfloat16 where the hardware has it, else float16 with scaled gradients; off on a CPU) or a dtype.
    sparse_backward: gradients of kept tokens alone, see PrunedViT.forward; None: in a single process, where that was measured to be
        faster. A step in which dropped ones turn out to have gradients is repeated with all, and so are the next ones, up to 31; in a
        run of several processes it is an error.
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
    sparse_backward: bool | None = None
    eval_every: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, ok, expected in (
                ("epochs", self.epochs >= 1, ">= 1"), ("batch_size", self.batch_size >= 1, ">= 1"),
                ("opt", _is_optimizer(self.opt), "one of timm's optimizers"),
                ("sched", self.sched in SCHEDS, f"one of {SCHEDS}"), ("seed", 0 <= self.seed < 2 ** 32, "in 0..2**32 - 1"),
                ("lr", self.lr > 0, "> 0"),
                ("min_lr", 0 <= self.min_lr <= self.lr, "in [0, lr]"),
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
        NonFiniteLoss: naming the first tensor that is not finite. A GPU has made the update by then where that is a gradient; what
            checkpoints hold is from before.
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
        run.corrupt = getattr(training, "corrupt", run.corrupt)
        done = 0 if checkpoints is None else checkpoints.resume(run)

        flags = []  # of processes on GPUs, which are not waited for: known a step later
        late = run.device.type == "cuda" and world()[1] > 1

        def stop_if_asked(save: bool = True) -> None:
            if checkpoints is None:
                return
            flags.append(in_any_process(bool(asked), run.device))
            if len(flags) <= late or not flags.pop(0).get():
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
        learned.follow(run.ema.module, model)
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
