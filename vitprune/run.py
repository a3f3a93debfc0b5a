"""A training run: one configuration, from YAML and the command line, and all that it names."""
from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
import yaml

from . import checkpoint as folders
from .blocks import BlockPruning
from .build import build
from .data import DataConfig, create_loaders
from .doctor import choose_device
from .evaluate import world
from .learned import refill, settle
from .progress import Progress
from .resume import Checkpoints, sync, write_metrics
from .step import NonFiniteLoss
from .subset import subset_ids, write_subset
from .surgery import compact
from .tokens import TokenPruning
from .train import Stopped, TrainConfig, keep_memory, train

RECIPES = Path(__file__).parent / "recipes"
_FREE = ("output", "resume", "keep_last", "save_every", "device", "data.workers", "train.sparse_backward")  # may differ where a run goes on


@dataclass(frozen=True)
class RunConfig:
    """What is trained, from what, on what, and where the results go.

    model: timm's name, or a folder written by vitprune.save. model_args: arguments of timm.create_model.
    output: folder for config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and the final model/.
    pretrained: start from timm's weights. checkpoint: start from this file, an official DynamicViT one among others.
    teacher: "start" (the model before it is pruned), a timm name or a folder; none: no distillation.
    teacher_checkpoint: weights of a teacher given by name; without, timm's pretrained ones.
    teacher_args: arguments of timm.create_model for a teacher given by name; without, model_args where it has the model's name.
    tokens, blocks: what is pruned; both: in tandem; none: the model is trained as it is.
    refill: where blocks.head_dim is below 1, revive the dead dimensions of the heads that remain before the model is saved
        ("hybrid-filled"): the next run starts from it and fine-tunes them.
    fraction, take: train on a part of the pictures: "first", "random" or class-"balanced"; its numbers go to subset.json.
    resume: "auto" continues where output holds checkpoints, "never" refuses to.
    keep_last: checkpoints kept beside the best. save_every: steps between them, besides the ends of epochs.
    device: cpu or cuda; by default the GPU where there is one.
    """
    model: str
    output: str
    model_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    teacher_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    tokens: TokenPruning | None = None
    blocks: BlockPruning | None = None
    refill: bool = False
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    fraction: float | None = None
    take: str = "first"
    resume: str = "auto"
    keep_last: int = 2
    save_every: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        folder = Path(self.model).is_dir()
        started = self.pretrained or self.checkpoint is not None or folder
        for name, ok, expected in (
                ("pretrained", not (self.pretrained and self.checkpoint), "off where checkpoint is given"),
                ("checkpoint", self.checkpoint is None or not folder, "None where model is a folder"),
                ("pretrained", not (self.pretrained and folder), "off where model is a folder"),
                ("model_args", not (self.model_args and folder), "empty where model is a folder"),
                ("teacher", self.teacher != "start" or started, "None or another model where the start has random weights"),
                ("teacher_checkpoint", self.teacher_checkpoint is None or self.teacher not in (None, "start"),
                 "None without a teacher's name"),
                ("teacher_args", not self.teacher_args or self.teacher not in (None, "start") and not Path(self.teacher).is_dir(),
                 "empty without a teacher's name"),
                ("output", not Path(self.output).is_file(), "a folder"),
                ("take", self.take == "first" or self.fraction is not None, "'first' where fraction is None"),
                ("data.subset", self.data.subset is None or self.fraction is None, "None where fraction is given"),
                ("refill", not self.refill or (self.blocks is not None and self.blocks.head_dim < 1), "off unless blocks.head_dim is < 1"),
                ("train.ramp_tokens", not self.train.ramp_tokens or (self.tokens is not None and self.tokens.score == "predictor"),
                 "off where no tokens are pruned by predictors"),
                ("save_every", self.save_every is None or self.save_every >= 1, "None or >= 1")):
            if not ok:
                value = self.data.subset if name == "data.subset" else True if name == "train.ramp_tokens" else getattr(self, name)
                raise ValueError(f"RunConfig: {name} must be {expected}, got {value!r}")


def recipe(name: str) -> str:
    """The path of a configuration: a file, or the name of a recipe that comes with the package.

    Raises FileNotFoundError listing the recipes.
    """
    shipped = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).is_file():
        try:
            values = yaml.safe_load(Path(name).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"train: config must be YAML, {name} is not: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"train: config must be a mapping of names to values, {name} holds {type(values).__name__}")
        return name
    if not shipped.is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"train: config must be a YAML file or one of {known}, got {name!r}")
    return str(shipped)


def find_recipes(argv: Sequence[str]) -> list[str]:
    """Command-line arguments with the paths of recipes in place of their names."""
    out = list(argv)
    for i, word in enumerate(out):
        if word == "--config" and i + 1 < len(out):
            out[i + 1] = recipe(out[i + 1])
        elif word.startswith("--config="):
            out[i] = "--config=" + recipe(word.removeprefix("--config="))
    return out


def main(config: RunConfig) -> int:
    """Train, evaluate and save; returns 0, or 128 + the signal's number for a run that was stopped and saved."""
    device = _join(config.device)
    if device.type == "cpu":
        keep_memory()
    try:
        return _run(config, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(device: str | None) -> torch.device:
    """This process's device; under torchrun it joins the others."""
    name = choose_device(device, "train")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(name)
    if ":" in name:
        raise ValueError(f"train: device must be cpu or cuda for several processes, which take a GPU each, got {name!r}")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return torch.device(name)


def _run(config: RunConfig, device: torch.device) -> int:
    output, (rank, size) = Path(config.output), world()
    checkpoints = Checkpoints(output / "checkpoints", config.keep_last, config.resume, config.save_every)
    checkpoints.check()
    if rank == 0:
        lock = _lock(output)  # held until the run is over  # noqa: F841
        _settle_config(config, output, continues=bool(checkpoints.candidates()))
    data = config.data if config.fraction is None else replace(config.data, subset=_subset(config, output, rank))
    training, held_out, classes = create_loaders(data, config.train.batch_size, config.train.seed, rank=rank, world_size=size)
    model, teacher = build(config, classes, None if data.source == "digits" else training.pictures.source.names)
    model, teacher = model.to(device), None if teacher is None else teacher.to(device)
    log = Log(output) if rank == 0 else None
    with Progress(config.train.epochs * len(training), quiet=rank > 0) as progress:
        try:
            history = train(model, (training, held_out), config.train, teacher, checkpoints=checkpoints, on_history=log,
                            on_epoch=lambda record: progress.say(show(record, config.train.epochs)), on_step=progress.to)
        except Stopped as stopped:
            if rank == 0:
                print(stopped, file=sys.stderr, flush=True)
            return 128 + stopped.signal
        except NonFiniteLoss as error:
            raise RuntimeError(str(error)) from error  # one line for the user, as of any other error
    if rank == 0:
        saved = "" if config.train.ema is None else " (the moving average)"
        if config.refill:
            settle(model)
            refill(model, torch.Generator().manual_seed(config.train.seed))
            saved += " (refilled since, to be fine-tuned)"
        folders.save(compact(model), output / "model")
        print(f"{output / 'model'}{saved}: {show(history[-1], config.train.epochs)}")
    return 0


def _lock(output: Path) -> TextIO | None:
    """Refuse an output that another run writes to; the lock goes with this process."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    lock = open(output / ".lock", "w")
    held = weakref.ref(lock)
    os.register_at_fork(after_in_child=lambda: (inherited := held()) and inherited.close())  # workers may outlive a killed run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"train: output must not be that of another run that is still going on, got {str(output)!r}") from None
    return lock


def _settle_config(config: RunConfig, output: Path, continues: bool) -> None:
    """Write config.yaml; where a run goes on, refuse another configuration than the one it began with."""
    path, values = output / "config.yaml", json.loads(json.dumps(asdict(config)))
    if continues and path.is_file():
        try:
            before = _flat(yaml.safe_load(path.read_text()))
        except (yaml.YAMLError, AttributeError) as error:
            raise ValueError(f"train: {path} must be the configuration that the run began with, it is damaged ({error!r:.80}): remove it "
                             "to go on with this one") from None
        now = _flat(values)
        for name in sorted(before.keys() | now.keys()):
            if name not in _FREE and before.get(name) != now.get(name):
                raise ValueError(f"train: {name} must be {before.get(name)!r}, as when the run in {output} began, got {now.get(name)!r} "
                                 "(another output begins a new run)")
    new = output / ".config.yaml"
    new.write_text(yaml.safe_dump(values, sort_keys=False))
    sync(new)
    os.replace(new, path)


def _flat(values: dict, prefix: str = "") -> dict:
    out = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _subset(config: RunConfig, output: Path, rank: int) -> str:
    """The file with the numbers of the pictures to train on."""
    path = output / "subset.json"
    if config.data.source == "digits":
        raise ValueError("train: fraction must be None for the digits, which are small as they are")
    if rank == 0:
        source = config.data.open(True)
        labels = range(len(source)) if config.take == "first" else source.labels()
        write_subset(path, subset_ids(labels, config.fraction, config.take, config.train.seed), len(source))
    if world()[1] > 1:
        dist.barrier()
    return str(path)


class Log:
    """metrics.jsonl, and TensorBoard's event files where it is installed, from the records of a run."""

    def __init__(self, output: Path) -> None:
        self.output, self.board, self.seen = output, None, 0
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter
        except ImportError:
            self.writer = None

    def __call__(self, history: list[dict]) -> None:
        """Bring the files up to these records, all of them since the beginning."""
        write_metrics(self.output / "metrics.jsonl", history)
        if self.writer is None:
            return
        if self.board is None:  # what a stopped run wrote after its last checkpoint is hidden
            self.seen = len(history)
            self.board = self.writer(str(self.output / "tensorboard"), purge_step=history[-1]["step"] + 1 if history else 0)
        for record in history[self.seen:]:
            for name, value in record.items():
                if name not in ("epoch", "step"):
                    self.board.add_scalar(name, value, record["step"])
        self.seen = len(history)
        self.board.flush()


def show(record: dict, epochs: int) -> str:
    """One line on an epoch."""
    parts = [f"epoch {record['epoch'] + 1}/{epochs}", f"loss {record['loss']:.4f}"]
    if kept := [f"{record[name]:.2f}" for name in record if name.startswith("keep_")]:
        parts.append(f"kept {' '.join(kept)}")
    parts += [f"{name} {record[name]:.2f} %" for name in ("top1", "top5", "ema_top1") if name in record]
    return ", ".join(parts)
