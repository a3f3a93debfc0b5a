"""Pictures and labels: the embedded handwritten digits in memory, and an image folder for evaluation."""
from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
import torch
import torch.nn.functional as F
from timm.data import ImageDataset, ImageNetInfo, create_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor

DIGITS_HELD_OUT = 600


@dataclass(frozen=True)
class TensorLoader:
    """Batches (images, labels) from tensors held in memory. Order and augmentation are functions of `seed` and `epoch`.

    Args:
        images: [M, C, H, W] in [0, 1]; a batch is normalised to (images - mean) / std.
        labels: int64 [M].
        training: shuffle, augment, and drop the last batch where it is short.
    """
    images: Tensor
    labels: Tensor
    batch_size: int
    mean: float
    std: float
    training: bool = False
    seed: int = 0
    epoch: int = 0

    def __post_init__(self):
        if not 0 < self.batch_size <= len(self.images):
            raise ValueError(f"TensorLoader: batch_size must be in 1..{len(self.images)}, got {self.batch_size}")

    def at_epoch(self, epoch: int) -> TensorLoader:
        """The same loader in the order and with the augmentation of another epoch."""
        return replace(self, epoch=epoch)

    def to(self, device: torch.device | str) -> TensorLoader:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def __len__(self) -> int:
        batches = len(self.images) / self.batch_size
        return math.floor(batches) if self.training else math.ceil(batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.images)
        order = torch.randperm(count, generator=random) if self.training else torch.arange(count)
        for rows in order.to(self.images.device).split(self.batch_size)[:len(self)]:
            images = self.images[rows]
            if self.training:
                images = augment(images, random)
            yield (images - self.mean) / self.std, self.labels[rows]


def augment(images: Tensor, generator: torch.Generator, *, shift: float = 0.5, degrees: float = 6.0,
            scale: float = 0.06) -> Tensor:
    """Moves each picture [B, C, H, W] by up to `shift` pixels, turns it and scales it, all at random; fills with zeros."""
    batch, _, height, width = images.shape
    uniform = 2 * torch.rand(batch, 4, generator=generator) - 1
    angle = math.radians(degrees) * uniform[:, 0]
    zoom = 1 + scale * uniform[:, 1]
    sin, cos = zoom * angle.sin(), zoom * angle.cos()
    down, right = 2 * shift / height * uniform[:, 2], 2 * shift / width * uniform[:, 3]
    theta = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)  # [B, 2, 3]
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), align_corners=False)


def load_digits(batch_size: int = 128, seed: int = 0) -> tuple[TensorLoader, TensorLoader]:
    """Training and held-out loaders of scikit-learn's 1,797 handwritten digits, [B, 1, 8, 8], 10 classes.

    The split is fixed and stratified: 1,197 to train on, 600 held out. `seed` governs order and augmentation only.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; the message names the extra that brings it.
    """
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("load_digits: the digits come with scikit-learn, which is missing: "
                                  "pip install 'vitprune[demo]'") from error
    digits = load()
    train, held_out = train_test_split(range(len(digits.target)), test_size=DIGITS_HELD_OUT, random_state=0,
                                       stratify=digits.target)
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    std, mean = (value.item() for value in torch.std_mean(images[train]))
    return (TensorLoader(images[train], labels[train], batch_size, mean, std, training=True, seed=seed),
            TensorLoader(images[held_out], labels[held_out], DIGITS_HELD_OUT, mean, std))


def folder_classes(root: str | Path) -> dict[str, int]:
    """Class id of each folder of pictures under `root`, by its name: WordNet ids of ImageNet-1k or -21k subsets of it.

    Raises:
        ValueError: the names are not WordNet ids of ImageNet-1k. Integer names are refused: their lexical order
            ("0", "1", "10", ...) is not their numeric one, so a guess would scramble the labels.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"create_eval_loader: source must be a folder of class folders, got {root}")
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not names:
        raise ValueError(f"create_eval_loader: source must hold one folder per class, found none in {root}")
    known = {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = "integer folder names do not say which class they mean" if re.fullmatch(r"\d+", unknown[0]) else \
            "folder names must be WordNet ids of ImageNet-1k, such as n01440764"
        raise ValueError(f"create_eval_loader: {hint}; got {unknown[0]!r} in {root} "
                         "(from Python: create_eval_loader(..., class_map={name: class id}))")
    return {name: known[name] for name in names}


class _Pictures(ImageDataset):
    """timm's stands in the next picture for one that it cannot read: an accuracy would count the wrong pictures."""

    def __getitem__(self, index: int):
        image, target = self.reader[index]
        try:
            with image:
                picture = PIL.Image.open(image).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            name = self.reader.filename(index, absolute=True)
            raise ValueError(f"evaluation: {name} must be a picture that can be read, "
                             f"got {type(error).__name__}: {error}") from None
        return self.transform(picture), target


def create_eval_loader(source: str | Path, batch_size: int = 64, *, class_map: dict[str, int] | None = None,
                       image_size: int = 224, resize: int = 256, mean: tuple = (0.485, 0.456, 0.406),
                       std: tuple = (0.229, 0.224, 0.225), workers: int = 2, device: torch.device | str = "cpu"):
    """Evaluation batches (images [B, 3, S, S], labels [B]) of an image folder: resize, centre crop, normalise.

    Args:
        source: folder with one folder of pictures per class, named by WordNet id of ImageNet-1k.
        class_map: class id by folder name, for folders with other names.

    Raises:
        ValueError: folder names without a known class (see `folder_classes`), or missing in `class_map`; while iterating,
            a picture that cannot be read.
    """
    if class_map is None:
        class_map = folder_classes(source)
    else:
        missing = sorted(path.name for path in Path(source).iterdir() if path.is_dir() and path.name not in class_map)
        if missing:
            raise ValueError(f"create_eval_loader: class_map must name every folder of {source}, lacks {missing[0]!r}")
    reader = ReaderImageFolder(str(source), class_map=class_map)
    device = torch.device(device)
    return create_loader(_Pictures(str(source), reader=reader), (3, image_size, image_size), batch_size,
                         crop_pct=image_size / resize, interpolation="bicubic", mean=mean, std=std,
                         num_workers=workers, device=device, use_prefetcher=False, pin_memory=device.type == "cuda",
                         persistent_workers=False)
