"""Batches from any source: the same order, augmentation and labels whatever the pictures come from."""
from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .digits import load_digits
from .evaluate import world
from .sources import TABLES, UNREADABLE, Source, Stream, decode, open_source
from .subset import read_subset

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and what is done to them.

    source: "digits" (embedded), an image folder (of splits, or of classes), "parquet:FILE_OR_FOLDER", "hf:NAME[@CONFIG]",
        "stream:NAME[@CONFIG]" or "stream:parquet:FILE_OR_FOLDER"; eval_source: of the held-out pictures, by default the same.
    train_split, eval_split: names of the splits ("val" and "validation" stand for each other).
    image_size, resize: evaluation resizes the shorter side to `resize` (by default image_size / 0.875) and crops the centre.
    scale, ratio, hflip, color_jitter, auto_augment, reprob, interpolation: timm's training transform; scale None: the
        evaluation's transform, as in block pruning's reference.
    workers: processes that decode. window: pictures are shuffled within windows of so many, None: all at once; a stream
        has windows of 10,000 by default (where it is sorted by class, shuffle it before), and other sources give the same
        batches with the same window.
    subset: file of picture numbers (see `subset.write_subset`). max_corrupt: share of unreadable pictures that training stands.
    skip_corrupt: whether evaluation, too, leaves them out instead of refusing.
    class_map: JSON file {class name: id}. image_key, label_key: columns, where they are not found. length: of a stream.

    Raises ValueError naming the field that is out of range.
    """
    source: str = "digits"
    eval_source: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    image_size: int = 224
    resize: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float | None = 0.4
    auto_augment: str | None = None
    reprob: float = 0.0
    interpolation: str = "bicubic"
    workers: int = 2
    window: int | None = None
    subset: str | None = None
    max_corrupt: float = 0.01
    skip_corrupt: bool = False
    class_map: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        columns = any(source.partition(":")[0] in TABLES for source in (self.source, self.eval_source or ""))
        for name, ok, expected in (("image_size", self.image_size >= 1, ">= 1"), ("workers", 0 <= self.workers <= 1024, "in 0..1024"),
                                   ("resize", self.resize is None or self.resize >= self.image_size, f"None or >= {self.image_size}"),
                                   ("window", self.window is None or self.window >= 1, "None or >= 1"),
                                   ("interpolation", self.interpolation in INTERPOLATIONS, f"one of {INTERPOLATIONS}"),
                                   ("image_key", columns or self.image_key is None, "None where no source has columns"),
                                   ("label_key", columns or self.label_key is None, "None where no source has columns"),
                                   ("max_corrupt", 0 <= self.max_corrupt <= 1, "in [0, 1]"), ("hflip", 0 <= self.hflip <= 1, "in [0, 1]"),
                                   ("reprob", 0 <= self.reprob <= 1, "in [0, 1]"), ("std", min(self.std) > 0, "> 0"),
                                   ("scale", self.scale is None or 0 < self.scale[0] <= self.scale[1] <= 1, "ascending in (0, 1], or None"),
                                   ("ratio", 0 < self.ratio[0] <= self.ratio[1], "ascending and > 0"),
                                   ("color_jitter", self.color_jitter is None or self.color_jitter >= 0, "None or >= 0")):
            if not ok:
                raise ValueError(f"DataConfig: {name} must be {expected}, got {getattr(self, name)}")

    def open(self, training: bool) -> Source:
        """The source of one split."""
        source = self.source if training or self.eval_source is None else self.eval_source
        split = self.train_split if training else self.eval_split
        return open_source(source, split, class_map=self.class_map, length=self.length if training else None,
                           image=self.image_key, label=self.label_key)

    def transform(self, training: bool):
        """timm's transform to a normalised tensor [3, S, S]."""
        common = dict(input_size=(3, self.image_size, self.image_size), interpolation=self.interpolation, mean=self.mean, std=self.std)
        if training and self.scale is not None:
            try:
                return _with_posterize(create_transform(
                    **common, is_training=True, scale=self.scale, ratio=self.ratio, hflip=self.hflip, color_jitter=self.color_jitter,
                    auto_augment=self.auto_augment, re_prob=self.reprob))
            except (AssertionError, KeyError) as error:
                raise ValueError(f"DataConfig: auto_augment must be a policy of timm's, got {self.auto_augment!r} ({error})") from None
        resize = self.resize or round(self.image_size / 0.875)
        return create_transform(**common, crop_pct=self.image_size / (resize + 0.5))  # timm rounds what it divides down


def _with_posterize(transform):
    """timm's transform, whose Posterize asks Pillow for 0 bits at its highest level: black, which Pillow 13 refuses to draw."""
    for step in transform.transforms:
        for op in itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if getattr(op, "name", "").startswith("Posterize"):
                op.aug_fn = functools.partial(_posterize, op.aug_fn)  # workers may have to pickle it
    return transform


def _posterize(timms, image, bits: int, **options):
    return timms(image, bits, **options) if bits else Image.new(image.mode, image.size)


class Pictures(IterableDataset):
    """Batches (images [B, 3, S, S], labels [B], names of unreadable pictures) of a source, in the order of an epoch.

    Order and augmentation of a picture are functions of (seed, epoch, its number), whatever the source, the worker and the
    number of processes. In training the next readable picture of the (whole) batch stands in for an unreadable one.
    An error of the data is yielded, not raised: a worker process would wrap it in its traceback.
    """

    def __init__(self, source: Source, transform, batch_size: int, *, training: bool, seed: int = 0, window: int | None = None,
                 subset: Sequence[int] | None = None, strict: bool = False, rank: int = 0, world_size: int = 1) -> None:
        self.source, self.transform, self.batch_size, self.training, self.seed = source, transform, batch_size, training, seed
        self.window = window or (10_000 if isinstance(source, Stream) else None)
        self.ids = torch.arange(len(source)) if subset is None else torch.tensor(sorted(subset))
        if len(self.ids) == 0 or not 0 <= int(self.ids[0]) <= int(self.ids[-1]) < len(source):
            raise ValueError(f"data: subset must hold numbers in 0..{len(source) - 1}, at least one, "
                             f"got {len(self.ids)} from {self.ids[:1].tolist()} to {self.ids[-1:].tolist()}")
        if training and (batch_size % world_size or batch_size > len(self.ids)):
            raise ValueError(f"data: batch_size must be a multiple of the {world_size} processes and at most the {len(self.ids)} pictures, "
                             f"got {batch_size}")
        self.strict, self.rank, self.world_size, self.epoch, self.start = strict, rank, world_size, 0, 0

    def batches(self) -> int:
        return len(self.ids) // self.batch_size if self.training else -(-len(self.ids) // self.batch_size)

    def order(self) -> Tensor:
        """Positions in `ids`, as this epoch visits them."""
        count = len(self.ids)
        if not self.training:
            return torch.arange(count)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        windows = torch.arange(count).split(self.window or count)
        return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]] | Exception]:
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        mine = [self.ids[rows].tolist() for number, rows in enumerate(self.order().split(self.batch_size)[:self.batches()])
                if number >= self.start and (number - self.start) % parts == part]
        try:
            for ids, record in self._read(mine):
                yield self._collate(ids, record)
        except (ValueError, OSError) as error:
            yield error

    def _read(self, batches: list[list[int]]) -> Iterator[tuple[list[int], Callable[[int], tuple[bytes, int, str]]]]:
        if self.source.random:
            for ids in batches:
                yield ids, lambda i: next(iter(self.source.records([i])))
            return
        wanted = sorted(i for ids in batches for i in ids)   # a stream: read on until the batch is complete, keep what later ones need
        arriving, held = zip(wanted, self.source.records(wanted)), {}
        for ids in batches:
            while any(i not in held for i in ids):
                i, record = next(arriving)
                held[i] = record
            yield ids, {i: held.pop(i) for i in ids}.__getitem__

    def _collate(self, ids: list[int], record: Callable[[int], tuple[bytes, int, str]]) -> tuple[Tensor, Tensor, list[str]]:
        images, labels, bad = [], [], []
        for position in range(len(ids) * self.rank // self.world_size, len(ids) * (self.rank + 1) // self.world_size):
            for i in ids[position:] + ids[:position] if self.training else [ids[position]]:
                data, label, name = record(i)
                try:
                    picture = decode(data)
                except UNREADABLE as error:
                    if self.strict:
                        raise ValueError(f"evaluation: {name} must be a picture that can be read, got {type(error).__name__}: {error} "
                                         "(skip_corrupt leaves such pictures out)") from None
                    bad.append(name)
                    continue
                images.append(self._augment(picture, i))
                labels.append(label)
                break
        stacked = torch.stack(images) if images else torch.zeros(0, 3, 1, 1)
        return stacked, torch.tensor(labels, dtype=torch.int64), bad

    def _augment(self, picture, i: int) -> Tensor:
        if not self.training:
            return self.transform(picture)
        seed = ((self.seed * 1_000_003 + self.epoch) * 2_147_483_647 + i) % 2 ** 63
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (timm's transforms draw from it)
        try:
            random.seed(seed)
            np.random.seed(seed % 2 ** 32)  # noqa: NPY002
            torch.manual_seed(seed)
            return self.transform(picture)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])


def _leave_signals_to_the_run(_: int) -> None:
    """In a worker: signals that reach every process of a run (a scheduler's, say) are the main one's to answer, which needs its
    workers to come to a checkpoint. Only that process itself ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # neither Linux nor a BSD
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    run = multiprocessing.parent_process().pid

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
            pass
        os._exit(0)
    threading.Thread(target=wait, daemon=True).start()


class Loader:
    """Batches (images, labels) of `Pictures`; counts unreadable ones and stops where there are too many."""

    def __init__(self, pictures: Pictures, workers: int, max_corrupt: float, epoch: int = 0, start: int = 0) -> None:
        self.pictures, self.workers, self.max_corrupt, self.epoch, self.start = pictures, workers, max_corrupt, epoch, start
        self.corrupt: set[str] = set()

    def at_epoch(self, epoch: int, start: int = 0) -> Loader:
        """The same pictures in the order and with the augmentation of another epoch, from its `start`th batch on."""
        other = Loader(self.pictures, self.workers, self.max_corrupt, epoch, start)
        other.corrupt = self.corrupt
        return other

    def __len__(self) -> int:
        return self.pictures.batches()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.pictures.epoch, self.pictures.start = self.epoch, self.start
        pinned = torch.cuda.is_initialized()  # a model is on a GPU, which then computes while the next batch is copied
        for batch in DataLoader(self.pictures, batch_size=None, num_workers=self.workers, worker_init_fn=_leave_signals_to_the_run,
                                pin_memory=pinned):
            if isinstance(batch, Exception):
                raise batch
            images, labels, bad = batch
            if bad and not self.corrupt.issuperset(bad):
                self.corrupt.update(bad)
                warnings.warn(f"data: {len(self.corrupt)} unreadable pictures so far, {bad[0]} among them", stacklevel=2)
                self._check()
            if len(images):
                yield images, labels
            elif self.pictures.training:
                raise ValueError(f"data: a batch must hold a picture that can be read, got none: {', '.join(bad[:5])}")
        if self.pictures.training and world()[1] > 1:  # each process has met some of them
            met: list = [None] * world()[1]
            dist.all_gather_object(met, sorted(self.corrupt))
            self.corrupt.update(*met)
            self._check()

    def _check(self) -> None:
        if self.pictures.training and len(self.corrupt) > self.max_corrupt * len(self.pictures.ids):
            raise ValueError(f"data: at most a share of {self.max_corrupt} (max_corrupt) of the {len(self.pictures.ids)} pictures "
                             f"may be unreadable, got {len(self.corrupt)}: {', '.join(sorted(self.corrupt)[:5])}, ...")


def create_loaders(data: DataConfig, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1):
    """(training, held-out, number of classes): see `Loader`; batch_size is that of all processes together.

    Raises ValueError where training and held-out pictures disagree about the classes.
    """
    if data.source == "digits":
        training, held_out = load_digits(batch_size, seed, rank=rank, world_size=world_size)
        return training, held_out, 10
    source, held = data.open(True), data.open(False)
    if source.names is not None and held.names is not None and list(source.names) != list(held.names):
        raise ValueError(f"data: training and held-out pictures must have the same classes, got {list(source.names)[:5]} and "
                         f"{list(held.names)[:5]}")
    if source.place == held.place:
        warnings.warn(f"data: the held-out pictures are those that are trained on: {data.source} has no splits; eval_source names others",
                      stacklevel=2)
    subset = None if data.subset is None else read_subset(data.subset, len(source))
    where = {"rank": rank, "world_size": world_size}
    training = Pictures(source, data.transform(True), batch_size, training=True, seed=seed, window=data.window, subset=subset, **where)
    return (Loader(training, data.workers, data.max_corrupt), create_eval_loader(data, batch_size, source=held, **where),
            count_classes(source, held))


def create_eval_loader(data: DataConfig, batch_size: int = 64, *, source: Source | None = None, rank: int = 0,
                       world_size: int = 1) -> Loader:
    """Batches (images [B, 3, S, S], labels [B]) of the held-out pictures: resize, centre crop, normalise, each picture once."""
    pictures = Pictures(source or data.open(False), data.transform(False), batch_size, training=False, strict=not data.skip_corrupt,
                        rank=rank, world_size=world_size)
    return Loader(pictures, data.workers, 1.0)


def count_classes(*sources: Source) -> int:
    """Classes of the sources together: by their names where they are known, else the largest id + 1."""
    named = [len(source.names) for source in sources if source.names is not None]
    return max(named) if named else max(max(source.labels()) for source in sources) + 1
