"""The model that a run trains, and its teacher, from what the configuration names."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from torch import nn

from . import checkpoint as folders
from .blocks import BlockPruning
from .convert import load_weights, start_from
from .evaluate import TAG
from .measure import image_size
from .surgery import prune
from .vit import PrunedViT

if TYPE_CHECKING:
    from .data import DataConfig
    from .run import RunConfig


def build(config: RunConfig, classes: int, names: Sequence[str] | None = None) -> tuple[nn.Module, nn.Module | None]:
    """(model, teacher or None) of a run on pictures of so many classes, with those names where they are known."""
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        start, dense = _start(config, classes)
        _check_pictures("model", config.model, start, config.data)
        model = start
        if config.tokens is not None and getattr(start, "tokens", None) != config.tokens:
            model = prune(model, tokens=config.tokens)
        if config.blocks is not None:
            model = prune(model, blocks=config.blocks)
        if dense is model:  # a saved model that is trained on as it is: its teacher must not learn with it
            dense = copy.deepcopy(dense)
        if not isinstance(model, PrunedViT) and not hasattr(model, "keep_counts"):
            model = prune(model, blocks=BlockPruning(granularity=1))  # nothing leaves: the dense model, in a form that can be saved
    if config.data.source != "digits":
        data = config.data
        model.pretrained_cfg = {"architecture": config.model, "tag": TAG, "input_size": (3, data.image_size, data.image_size),
                                "mean": data.mean, "std": data.std, "interpolation": data.interpolation, "num_classes": classes,
                                "label_names": names and list(names),
                                "crop_pct": data.image_size / (data.resize or round(data.image_size / 0.875))}
        model.default_cfg = model.pretrained_cfg
    return model, _teacher(config, classes, dense, model)


def _start(config: RunConfig, classes: int) -> tuple[nn.Module, nn.Module | None]:
    """(the model to start from, the same without pruned tokens where there is one)."""
    if Path(config.model).is_dir():
        model = folders.load(config.model)
        _check_classes("model", config.model, model.num_classes, classes)
        return model, None if model.tokens is not None else model
    model = _create(config, "model", config.model, classes, config.pretrained, **config.model_args)
    if config.checkpoint is None:
        return model, model
    return start_from(model, config.checkpoint, config.tokens)


def _create(config: RunConfig, what: str, name: str, classes: int, pretrained: bool, **more) -> nn.Module:
    if not timm.is_model(name):
        raise ValueError(f"train: {what} must be the name of a timm model or a folder written by vitprune.save, got {name!r}")
    arguments = {} if config.data.source == "digits" else {"img_size": config.data.image_size}
    arguments |= {"num_classes": classes, **more}
    try:
        made = timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"train: {what} and {what}_args must make a timm VisionTransformer, got {name!r} with {arguments}: {error}"
                         ) from None
    _check_classes(what, name, made.num_classes, classes)
    return made


def _teacher(config: RunConfig, classes: int, dense: nn.Module | None, student: nn.Module) -> nn.Module | None:
    if config.teacher is None:
        return None
    if config.teacher == "start":
        if config.pretrained:
            _check_head(config.model, dense, classes)
        if dense is None:
            raise ValueError(f"train: teacher must be a model that keeps its tokens, but {config.model} prunes them: name another")
        return dense
    if Path(config.teacher).is_dir():
        teacher = folders.load(config.teacher)
        if teacher.tokens is not None:
            raise ValueError(f"train: teacher must be a model that keeps its tokens, but {config.teacher} prunes them")
    else:
        arguments = config.teacher_args or (config.model_args if config.teacher == config.model else {})
        teacher = _create(config, "teacher", config.teacher, classes, config.teacher_checkpoint is None, **arguments)
        if config.teacher_checkpoint is not None:
            load_weights(teacher, config.teacher_checkpoint)
        else:
            _check_head(config.teacher, teacher, classes)
    _check_classes("teacher", config.teacher, teacher.num_classes, classes)
    _check_pictures("teacher", config.teacher, teacher, config.data)
    of = [(getattr(m, "embed_dim", None), getattr(getattr(m, "patch_embed", None), "num_patches", None)) for m in (student, teacher)]
    if config.train.token_weight and of[0] != of[1]:
        raise ValueError("train: teacher must have the model's {} channels and {} patches for the loss of tokens (train.token_weight 0 "
                         "leaves it out), {} has {} and {}".format(*of[0], config.teacher, *of[1]))
    return teacher


def _check_head(name: str, teacher: nn.Module, classes: int) -> None:
    """timm gives a pretrained model a new, random head where the number of classes differs."""
    if (known := teacher.pretrained_cfg.get("num_classes", classes)) != classes:
        raise ValueError(f"train: teacher must know the data's {classes} classes, the pretrained {name} knows {known} others: train it "
                         "on the data without pruning first and name its folder, or teacher_checkpoint, or leave the teacher out")


def _check_classes(what: str, name: str, got: int, classes: int) -> None:
    if got != classes:
        raise ValueError(f"train: {what} must have the data's {classes} classes, {name} has {got}")


def _check_pictures(what: str, name: str, model: nn.Module, data: DataConfig) -> None:
    expected = (1, 8, 8) if data.source == "digits" else (3, data.image_size, data.image_size)
    if (got := image_size(model)) != expected:
        raise ValueError(f"train: {what} must take the data's pictures {list(expected)} (data.source {data.source!r}), "
                         f"{name} takes {list(got)}")
