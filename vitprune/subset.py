"""Parts of a source to train on: which pictures, and the file with their numbers."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch


def subset_ids(labels: Sequence[int], fraction: float, how: str = "first", seed: int = 0) -> list[int]:
    """Ascending numbers of a part of the pictures: the "first", a "random" or a class-"balanced" fraction of them."""
    count = len(labels)
    if not 0 < fraction <= 1:
        raise ValueError(f"subset: fraction must be in (0, 1], got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    if how == "first":
        return list(range(int(count * fraction)))
    if how == "random":
        return torch.randperm(count, generator=generator)[:int(count * fraction)].sort().values.tolist()
    if how != "balanced":
        raise ValueError(f"subset: how must be first, random or balanced, got {how!r}")
    known, chosen = torch.tensor(list(labels)), []
    for label in known.unique().tolist():
        members = (known == label).nonzero().flatten()
        chosen += members[torch.randperm(len(members), generator=generator)][:max(1, round(len(members) * fraction))].tolist()
    return sorted(chosen)


def write_subset(path: str | Path, ids: Sequence[int], count: int) -> None:
    """Write the numbers of a subset and of how many pictures it is one."""
    Path(path).write_text(json.dumps({"count": count, "ids": list(ids)}) + "\n")


def read_subset(path: str | Path, count: int | None = None) -> list[int]:
    """The numbers that `write_subset` wrote, of `count` pictures where that is given.

    Raises ValueError where the file is none of its, is one of other pictures, or repeats a number.
    """
    try:
        found = json.loads(Path(path).read_text())
        ids, total = found["ids"], found["count"]
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ValueError("ids that are not whole numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'subset: {str(path)!r} must hold JSON {{"count": pictures, "ids": [numbers]}}, got {type(error).__name__}: '
                         f"{error}") from None
    if count is not None and total != count:
        raise ValueError(f"subset: {str(path)!r} must be one of the source's {count} pictures, got one of {total}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"subset: {str(path)!r} must hold each number once, got {len(ids) - len(set(ids))} repeated")
    return ids
