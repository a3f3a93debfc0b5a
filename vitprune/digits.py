"""The embedded handwritten digits, and batches of pictures held in memory."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS_HELD_OUT = 600


@dataclass(frozen=True)
class TensorLoader:
    """Batches (images, labels) from tensors held in memory. Order and augmentation are functions of `seed` and `epoch`.

    Args:
        images: [M, C, H, W] in [0, 1]; a batch is normalised to (images - mean) / std.
        labels: int64 [M].
        augmentation: of a batch, with a generator, in training; by default `augment`, small moves and turns.
        training: shuffle, augment, and drop the last batch where it is short.
        start: first batch of the epoch. rank, world_size: the part of every batch that this process gets.
    """
    images: Tensor
    labels: Tensor
    batch_size: int
    mean: float
    std: float
    training: bool = False
    augmentation: Callable[[Tensor, torch.Generator], Tensor] | None = None
    seed: int = 0
    epoch: int = 0
    start: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if not 0 < self.batch_size <= len(self.images):
            raise ValueError(f"TensorLoader: batch_size must be in 1..{len(self.images)}, got {self.batch_size}")
        if self.training and self.batch_size % self.world_size:
            raise ValueError(f"TensorLoader: batch_size must be a multiple of the {self.world_size} processes, got {self.batch_size}")

    def at_epoch(self, epoch: int, start: int = 0) -> TensorLoader:
        """The same loader in the order and with the augmentation of another epoch, from its `start`th batch on."""
        return replace(self, epoch=epoch, start=start)

    def to(self, device: torch.device | str) -> TensorLoader:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def __len__(self) -> int:
        batches = len(self.images) / self.batch_size
        return math.floor(batches) if self.training else math.ceil(batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, seed = len(self.images), self.seed * 1_000_003 + self.epoch
        order = torch.arange(count)
        if self.training:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        for batch, rows in list(enumerate(order.split(self.batch_size)))[self.start:len(self)]:
            share = slice(None) if self.world_size == 1 else slice(len(rows) * self.rank // self.world_size,
                                                                   len(rows) * (self.rank + 1) // self.world_size)
            images = self.images[rows.to(self.images.device)]
            if self.training:
                images = (self.augmentation or augment)(images, torch.Generator().manual_seed((seed * 65_537 + batch) % 2 ** 63))
            yield (images[share] - self.mean) / self.std, self.labels[rows[share].to(self.labels.device)]


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


def load_digits(batch_size: int = 128, seed: int = 0, *, rank: int = 0, world_size: int = 1) -> tuple[TensorLoader, TensorLoader]:
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
    where = {"rank": rank, "world_size": world_size}
    return (TensorLoader(images[train], labels[train], batch_size, mean, std, training=True, seed=seed, **where),
            TensorLoader(images[held_out], labels[held_out], DIGITS_HELD_OUT, mean, std, **where))
