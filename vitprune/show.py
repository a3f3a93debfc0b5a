"""Pictures of what a pruned model does: patches kept, heads and hidden blocks that are left, training curves."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import report
from .data import DataConfig
from .evaluate import preprocessing
from .sources import UNREADABLE, decode
from .vit import PrunedViT

NOT_CURVES = {"epoch", "step", "count", "ema_count"}


def show(model: PrunedViT, pictures: Sequence[str | Path], output: str | Path, metrics: str | Path | None = None) -> None:
    """Write an HTML page: what each stage keeps of the pictures, the units that are left in every layer, and the curves of
    a metrics.jsonl.

    Raises ValueError or FileNotFoundError naming what cannot be shown.
    """
    sections = []
    if pictures and model.tokens is None:
        raise ValueError("show: pictures must be none for a model whose tokens are not pruned")
    if pictures and model.in_chans != 3:
        raise ValueError(f"show: pictures must be none for a model that takes {model.in_chans} channels, not the 3 of a picture")
    if metrics is not None and not Path(metrics).is_file():
        raise FileNotFoundError(f"show: metrics must be the metrics.jsonl of a training run, got {str(metrics)!r}")
    if pictures:
        data = preprocessing(model, "")
        images = torch.stack([_read(path, data) for path in pictures])
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
        kept = report.patches((images * std + mean).clamp(0, 1), model.eval().trace_tokens(images), model.patch_embed.patch_size[0])
        sections.append(("Patches kept", kept + "<p class=note>Faded patches were dropped at that stage.</p>"))
    for heading, live in (("Heads", heads(model)), ("Hidden blocks", hidden_blocks(model))):
        sections.append((heading, report.units(live, "layer", heading.lower())))
    if metrics is not None:
        sections += [(name, report.curve(*points, "epoch", name)) for name, points in curves(metrics).items()]
    report.write(output, report.page("vitprune show", sections))


def _read(path: str | Path, data: DataConfig) -> Tensor:
    try:
        return data.transform(False)(decode(Path(path).read_bytes()))
    except UNREADABLE as error:
        raise ValueError(f"show: {path} must be a picture that can be read, got {type(error).__name__}: {error}") from None


def heads(model: PrunedViT) -> Tensor:
    """[layers, heads]: 1 live, 0 dropped; of a compacted model only how many are left is known: they come first."""
    return _map([(b.attn.num_heads, b.attn.live) for b in model.blocks])


def hidden_blocks(model: PrunedViT) -> Tensor:
    """[layers, blocks] of hidden units, as `heads`."""
    return _map([(b.mlp.fc1.out_features // b.mlp.width, b.mlp.live) for b in model.blocks])


def _map(layers: list[tuple[int, Tensor | None]]) -> Tensor:
    out = torch.zeros(len(layers), max(1, *(count for count, _ in layers)))
    for row, (count, live) in zip(out, layers):
        row[:count] = 1 if live is None else 0
        if live is not None:
            row[live.long().cpu()] = 1
    return out


def curves(metrics: str | Path) -> dict[str, tuple[list[float], list[float]]]:
    """(epochs, values) of every number in a metrics.jsonl. Raises ValueError for a line that is not JSON."""
    out: dict[str, tuple[list[float], list[float]]] = {}
    for number, line in enumerate(Path(metrics).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            epoch = record["epoch"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"show: line {number} of {metrics} must be a record of a training run, got {line[:40]!r}") from None
        for name, value in record.items():
            if isinstance(value, (int, float)) and name not in NOT_CURVES:
                xs, ys = out.setdefault(name, ([], []))
                xs.append(epoch + 1)
                ys.append(value)
    return out
