"""Checkpoints of a run: atomic, the last few and the best kept, and a run that continues from them bit for bit."""
from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .evaluate import world

WEIGHTS, EMA, STATE = "weights.safetensors", "ema.safetensors", "state.pt"


class Checkpoints:
    """The checkpoints of one run in `folder`: `step-N` (the last `keep`) and `best-N` (the highest
    top-1, of the moving average where there is one).

    A checkpoint is written to a hidden folder, brought to the disk, and renamed: under its name it is whole or not there.
    In a distributed run process 0 writes and all read.
    resume: "auto" continues where there is a checkpoint, "never" raises FileExistsError there.
    every: steps between checkpoints, besides the ends of epochs; None: no others.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2, resume: str = "auto", every: int | None = None) -> None:
        if keep < 1:
            raise ValueError(f"Checkpoints: keep must be >= 1, got {keep}")
        if resume not in ("auto", "never"):
            raise ValueError(f"Checkpoints: resume must be 'auto' or 'never', got {resume!r}")
        self.folder, self.keep, self.mode, self.every = Path(folder), keep, resume, every
        self.damaged: list[Path] = []

    def found(self, kind: str = "step") -> list[Path]:
        """The checkpoints of that kind, the newest first."""
        return sorted(self.folder.glob(f"{kind}-*"), reverse=True)

    def candidates(self) -> list[Path]:
        """What `resume` tries in turn: the newest first, the best among them."""
        return sorted(self.found() + self.found("best"), key=lambda path: path.name.split("-")[1], reverse=True)

    def check(self) -> None:
        """Raises FileExistsError with resume="never" where there are checkpoints."""
        found = self.candidates()
        if found and self.mode == "never":
            raise FileExistsError(f"train: {self.folder} must hold no checkpoints (resume is 'never'), it has {found[0].name}")

    def resume(self, run) -> int:
        """Load the newest checkpoint that can be read into a `train.Run`; the number of steps done, 0 without one.

        Raises FileExistsError with resume="never" where there is one, RuntimeError where there are some and none can be read.
        """
        self.check()
        found = self.candidates()
        for path in found:
            try:
                weights, state = load_file(path / WEIGHTS), torch.load(path / STATE, map_location="cpu", weights_only=True)
                ema = load_file(path / EMA) if run.ema is not None else None
            except Exception as error:  # truncated, damaged, foreign: what can be wrong with a file is open
                warnings.warn(f"train: {path} cannot be read ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); "
                              "the one before is tried", stacklevel=2)
                self.damaged.append(path)
                continue
            run.model.load_state_dict(weights)
            run.load_state_dict(state["run"])
            if ema is not None:
                run.ema.module.load_state_dict(ema)
            return state["done"]
        if found:
            raise RuntimeError(f"train: none of the {len(found)} checkpoints in {self.folder} can be read: move them away to start anew")
        return 0

    def save(self, run, done: int) -> None:
        """Write the checkpoint of a `train.Run` after `done` steps, then delete what is too old."""
        run.settle()
        run.average_totals()  # a process that resumes knows nothing of the others' parts
        if world()[0] == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            for path in self.damaged:  # out of the way, not gone: who knows what it was that could not be read
                os.rename(path, self.folder / f"damaged-{path.name}-{time.time_ns()}")
            self.damaged.clear()
            self._write("step", run, done)
            for path in self.found()[self.keep:]:
                self._delete(path)
            top1 = "top1" if run.ema is None else "ema_top1"
            scores = [record[top1] for record in run.history if top1 in record]
            whole = done == len(run.history) * run.steps and top1 in (run.history or [{}])[-1]
            if whole and scores[-1] >= max(scores):
                self._write("best", run, done)
                for path in self.found("best")[1:]:
                    self._delete(path)
        if world()[1] > 1:
            torch.distributed.barrier()

    def _write(self, kind: str, run, done: int) -> None:
        path = self.folder / f"{kind}-{done:08d}"
        if path.exists():
            return
        new = self.folder / f".new-{path.name}"
        try:
            new.mkdir()
            save_file(_contiguous(run.model), new / WEIGHTS)
            if run.ema is not None:
                save_file(_contiguous(run.ema.module), new / EMA)
            torch.save({"done": done, "run": run.state_dict()}, new / STATE)
            for item in (*new.iterdir(), new):
                sync(item)
            os.rename(new, path)
            sync(self.folder)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
            shutil.rmtree(new, ignore_errors=True)
            raise OSError(f"train: {path} could not be written, the checkpoints before are as they were: {error}") from error

    def _delete(self, path: Path) -> None:
        gone = path.with_name(f".old-{path.name}")
        os.rename(path, gone)  # first out of sight, so that no half of it is ever found
        shutil.rmtree(gone)

    def _clean(self) -> None:
        """What a process that was killed has left."""
        for path in (*self.folder.glob(".new-*"), *self.folder.glob(".old-*")):
            shutil.rmtree(path)


def _contiguous(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def write_metrics(path: Path, history: list[dict]) -> None:
    """Write metrics.jsonl, a line an epoch, in one rename: after a resumption no line is missing or there twice."""
    new = path.with_name(f".{path.name}")
    new.write_text("".join(json.dumps(record) + "\n" for record in history))
    sync(new)
    os.replace(new, path)


def sync(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
