"""One forward pass of any model, for the losses and for its accuracy."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .dense import unwatched
from .vit import PrunedDistilledViT, PrunedOutput, PrunedViT

if TYPE_CHECKING:
    from .data import DataConfig


TAG = "vitprune"  # of a pretrained_cfg that says how the model was trained here


def world() -> tuple[int, int]:
    """(rank, number of processes) of the run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class Later:
    """Values of a tensor that are on their way to the host: the device is not held up, and reading waits for what it had to do before."""

    def __init__(self, t: Tensor) -> None:
        self.values, self.event = t.detach(), None
        if t.device.type == "cuda":
            self.values = torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(self.values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(t.device))

    def get(self) -> Tensor:
        """The values, on the host."""
        if self.event is not None:
            self.event.synchronize()
        return self.values


def in_any_process(flag: Tensor | bool, device: torch.device) -> Later:
    """Whether the flag, a bool or a tensor of one on that device, is set in any process: every process must ask."""
    if world()[1] == 1:
        return Later(torch.as_tensor(flag))
    shared = flag.float() if isinstance(flag, Tensor) else torch.full((), float(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return Later(shared > 0)


def forward(model: nn.Module, images: Tensor, sparse_backward: bool | None = False) -> PrunedOutput:
    """Images [B, C, H, W] -> PrunedOutput of a pruned or a dense model."""
    if isinstance(model, (PrunedViT, PrunedDistilledViT)):
        return model(images, details=True, sparse_backward=sparse_backward)
    return PrunedOutput(*_dense(model, images), None, ())


def _dense(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.forward_features(images)  # [B, P+N, C]
    return model.forward_head(tokens), tokens[:, model.num_prefix_tokens:]


def teach(teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, classes] and features [B, N, C] of the dense teacher, as constants."""
    with torch.inference_mode():
        logits, features = _dense(teacher, images)
    return logits.clone(), features.clone()  # out of inference mode: only ordinary tensors can be saved for backward


@torch.no_grad()
def first_non_finite(model: nn.Module, images: Tensor, parts: dict[str, Tensor], seed: int, teacher: nn.Module | None = None) -> str:
    """Name of the first tensor that is not finite: images, a parameter, a module's output in a replayed forward pass
    with the same `seed`, the same of the teacher, or a part of the loss. Called under the autocast of the step."""
    def bad(value) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all()

    if bad(images):
        rows = (~torch.isfinite(images).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        return f"images (rows {rows[:5]} of the batch)"
    for whose, network in (("", model), ("the teacher's ", teacher)):
        if network is not None and (found := _first_non_finite(network, images, seed, bad)):
            return whose + found
    return next((f"loss part {name}" for name, value in parts.items() if bad(value)), "the weighted total")


def _first_non_finite(model: nn.Module, images: Tensor, seed: int, bad: Callable[[object], bool]) -> str | None:
    for name, parameter in model.named_parameters():
        if bad(parameter):
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str):
        def hook(_module, _inputs, output):
            if not found and any(map(bad, output if isinstance(output, tuple) else [output])):
                found.append(f"output of module {name or 'model'}")
        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        torch.manual_seed(seed)
        with unwatched():  # what is dead did not take part
            forward(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, seed: int = 0) -> dict:
    """{"top1": percent, "top5": percent, "count": pictures} in evaluation mode; the model's mode is restored.

    In a distributed run every process evaluates its own part and all get the counts of the whole.
    `seed` fixes what is random in evaluation: the choice of a model with `score="random"`.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    counts, seen = torch.zeros(3, dtype=torch.int64, device=device), 0  # right, right among five, pictures
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for images, labels in loader:
                largest = int(labels.max()) if labels.numel() else 0  # before they are on a GPU, which would be waited for
                logits = model(images.to(device, non_blocking=True))
                if largest >= logits.shape[-1]:
                    raise ValueError(f"evaluate: labels must be in 0..{logits.shape[-1] - 1}, the model's classes, got {largest}")
                best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels.to(device, non_blocking=True)[:, None]  # [B, 5]
                counts[:2] += torch.stack([best[:, 0].sum(), best.sum()])
                seen += len(labels)
    finally:
        model.train(was_training)
    counts[2] = seen
    if world()[1] > 1:
        dist.all_reduce(counts)
    top1, top5, count = counts.tolist()
    if count == 0:
        raise ValueError("evaluate: loader must yield at least one picture, got none")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "count": count}


def evaluate_source(model: nn.Module, source: str, device: torch.device | str = "cpu", batch_size: int = 64, *,
                    resize: int | None = None, **options) -> dict:
    """`evaluate` on the held-out pictures of a `DataConfig` source, with the preprocessing that the model was made for.

    resize: of the shorter side before the crop; by default as the model's configuration says, DeiT's 256 as in its paper.
    options: other fields of DataConfig (eval_split, workers, class_map, skip_corrupt, ...). Raises ValueError where the
    source's classes are not the model's.
    """
    from .data import create_eval_loader
    from .digits import load_digits

    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be >= 1, got {batch_size}")
    if source == "digits":
        for name, value, default in (("resize", resize, None), *((n, options.get(n, d), d) for n, d in (
                ("eval_split", "val"), ("class_map", None), ("skip_corrupt", False)))):
            if value != default:
                raise ValueError(f"evaluate: {name} must be left out for the digits, whose 600 held-out pictures are fixed, got {value!r}")
        size = getattr(model.patch_embed, "img_size", None)
        if size not in (None, (8, 8)):
            raise ValueError(f"evaluate: model must take the digits' pictures of 8 x 8, it takes {size[0]} x {size[1]}")
        return evaluate(model.to(device), load_digits()[1])
    data = preprocessing(model, source, resize, **options)
    pictures = data.open(False)
    if pictures.names is not None and len(pictures.names) != model.num_classes:
        raise ValueError(f"evaluate: the classes of {source} must be the model's {model.num_classes}, got {len(pictures.names)} "
                         "(class_map tells their ids)")
    known = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if known and pictures.names is not None and list(known) != list(pictures.names):
        i, (mine, theirs) = next((i, pair) for i, pair in enumerate(zip(known, pictures.names)) if pair[0] != pair[1])
        raise ValueError(f"evaluate: the classes of {source} must be the model's in its order, got {theirs!r} where it has {mine!r} "
                         f"(class {i}; class_map tells their ids)")
    return evaluate(model.to(device), create_eval_loader(data, batch_size, source=pictures))


def preprocessing(model: nn.Module, source: str, resize: int | None = None, **options) -> DataConfig:
    """How pictures of `source` are read for a model, by its pretrained_cfg; resize and options as for `evaluate_source`."""
    from timm.data import resolve_data_config

    from .data import DataConfig

    c = resolve_data_config(model=model)
    size, crop = c["input_size"][-1], c["crop_pct"]
    known = getattr(model, "pretrained_cfg", None) or {}
    if crop == 0.9 and str(known.get("architecture")).startswith("deit_") and known.get("tag") != TAG:
        crop = 0.875  # timm measured 0.9 to be better; every published figure of DeiT and DynamicViT is at 256
    return DataConfig(source=source, image_size=size, resize=resize or int(size / crop + 1e-6), interpolation=c["interpolation"],
                      mean=tuple(c["mean"]), std=tuple(c["std"]), **options)
