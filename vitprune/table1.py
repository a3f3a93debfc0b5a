"""The paper's Table 1, side by side: what it printed, what is true, and what this machine measures.

Printed figures: "Vision Transformer Pruning", Table 1 and section 5.1. True counts: one image at the resolution named,
MACs in fvcore's convention; the tests hold `measure.count` to them. True accuracies: the authors' own tables
(facebookresearch/deit, snap-research/EfficientFormer, raoyongming/DynamicViT, micronDLA/MobileViTv3).
"""
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .bench import check_removed, interleave, machine, prepare
from .convert import load_dynamicvit, load_weights
from .measure import count, image_size
from .progress import Progress

NOTES = {
    "a": "\"FLOPs\" of ViT, DeiT and DynamicViT are multiply-accumulates (MACs), here as there: 1 MAC = 2 FLOPs.",
    "b": "77.9 % belongs to ViT-B/16 at 384x384, which has 86.86 M parameters and 55.54 GMACs; 224x224 costs 17.58.",
    "c": "EfficientFormer's figures are 2 x MACs, beside MACs in the other rows: L7 is 7.4 G below DeiT-B, not 2.8 G above.",
    "d": "DynamicViT-B/0.7 runs at 224x224 (DeiT-B at 384x384 alone is 55.5 G). All of it is 11.489 GMACs, 11.076 without the "
         "predictors; 11.2 comes out of neither. Its authors' released model reaches 81.43 %.",
    "e": "The FLOPs are those of the geometric schedule b, b^2, b^3, not of the b, b-0.2, b-0.4 in the text (11.32, 10.00, 8.67, "
         "7.37 G): at b = 0.4 block 9 keeps 12 patches, not 0. 89.4 M is 89.45 M truncated. Accuracies: the paper's own, unchecked.",
    "f": "MobileViTv3-0.5: its authors report 72.33 % (1.4 M parameters, 0.481 G); 74.01 does not match.",
    "g": "SkipblockNet-L: its authors' repository has no table that would confirm the figures.",
    "h": "VTP (DeiT-B, 40 % pruned), from the literature and not confirmed: no official code was found.",
    "i": "Not in the paper: half of heads and hidden units removed, alone and with tokens at 0.7, what the paper set out to combine.",
    "j": "Not in the paper's table; it argues with convolutional networks without measuring them.",
}


@dataclass(frozen=True)
class Row:
    """One line: printed and true are (parameters M, G, pixels, top-1 %), None where there is no figure.

    model: timm's name, None for rows known from the literature only; options: what `prepare` prunes;
    checkpoint: the file (.pth, .safetensors) in --checkpoints whose accuracy is measured.
    """
    name: str
    printed: tuple[float | None, float | None, int | None, float | None] | None
    true: tuple[float | None, float | None, int | None, float | None]
    notes: str = ""
    model: str | None = None
    options: tuple[tuple[str, float], ...] = ()
    checkpoint: str | None = None


DEIT = "deit_base_patch16_224"
BLOCKS = (("heads", 0.5), ("hidden", 0.5))
ROWS = (
    Row("ViT-Base", (86.6, 17.6, 224, 77.9), (86.568, 17.583, 224, None), "ab", "vit_base_patch16_224", (), "vit_base_patch16_224"),
    Row("DeiT-Base/16", (86.6, 17.6, 224, 81.8), (86.568, 17.583, 224, 81.8), "a", DEIT, (), DEIT),
    Row("EfficientFormer-L1", (12.3, 2.6, 224, 79.2), (12.290, 1.302, 224, 79.2), "c", "efficientformer_l1", (), "efficientformer_l1"),
    Row("EfficientFormer-L3", (31.3, 7.8, 224, 82.4), (31.406, 3.929, 224, 82.4), "c", "efficientformer_l3", (), "efficientformer_l3"),
    Row("EfficientFormer-L7", (82.1, 20.4, 224, 83.3), (82.229, 10.166, 224, 83.3), "c", "efficientformer_l7", (), "efficientformer_l7"),
    Row("DynamicViT-B/0.7", (None, 11.2, 384, 81.3), (89.453, 11.489, 224, 81.43), "ad", DEIT, (("tokens", 0.7),), "dynamicvit_base_0.7"),
    Row("DyViT-Sub/0.7", (89.4, 11.5, 224, 80.1), (89.453, 11.489, 224, None), "ae", DEIT, (("tokens", 0.7),), "dyvit_sub_0.7"),
    Row("DyViT-Sub/0.6", (89.4, 9.9, 224, 78.9), (89.453, 9.879, 224, None), "ae", DEIT, (("tokens", 0.6),), "dyvit_sub_0.6"),
    Row("DyViT-Sub/0.5", (89.4, 8.6, 224, 74.4), (89.453, 8.571, 224, None), "ae", DEIT, (("tokens", 0.5),), "dyvit_sub_0.5"),
    Row("DyViT-Sub/0.4", (89.4, 7.4, 224, 63.1), (89.453, 7.447, 224, None), "ae", DEIT, (("tokens", 0.4),), "dyvit_sub_0.4"),
    Row("DeiT-B, half blocks", None, (44.068, 8.859, 224, None), "ai", DEIT, BLOCKS, "deit_base_h50"),
    Row("DeiT-B, half blocks, tokens 0.7", None, (46.953, 6.015, 224, None), "ai", DEIT, (("tokens", 0.7), *BLOCKS), "deit_base_t70_h50"),
    Row("ResNet-152", None, (60.193, 11.559, 224, None), "aj", "resnet152", (), "resnet152"),
    Row("EfficientNet-B0", None, (5.289, 0.399, 224, None), "aj", "efficientnet_b0", (), "efficientnet_b0"),
    Row("MobileNetV3-L", None, (5.483, 0.225, 224, None), "aj", "mobilenetv3_large_100", (), "mobilenetv3_large_100"),
    Row("MobileViTv3-0.5", (None, 0.481, None, 74.01), (1.4, 0.481, 256, 72.33), "f"),
    Row("SkipblockNet-L", (None, 0.364, None, 77.1), (None, None, None, None), "g"),
    Row("VTP, DeiT-B", None, (48.0, 10.0, 224, 80.7), "h"),
)
BASE = next(i for i, row in enumerate(ROWS) if row.name == "DeiT-Base/16")


def make(row: Row) -> nn.Module:
    """The row's model with random weights, in evaluation mode."""
    dense, pruned = prepare(row.model, **dict(row.options))
    return dense if pruned is None else pruned


def table1(quick: bool = False, data: str | None = None, checkpoints: str | None = None, device: str = "cpu",
           rows: tuple[Row, ...] = ROWS, base: int = BASE) -> dict:
    """Measure every row that has a model: counts, and speed interleaved with the base row's.

    data: image folder of the validation set; checkpoints: folder with NAME.pth, NAME.safetensors (or NAME/, written by
    `vitprune.save`) for the NAME of a row's `checkpoint`; both or neither. Raises ValueError or FileNotFoundError otherwise.
    """
    weights = _weights(rows, data, checkpoints)
    batches = (1,) if quick else (1, 8)
    reference = make(rows[base]).to(device)
    reference_macs, out = count(reference).macs, []
    with Progress(len(rows)) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the token predictors are untrained")  # time does not depend on the choice
        for i, row in enumerate(rows):
            progress.say(row.name)
            out.append({**asdict(row), "options": dict(row.options), "measured": None})
            if row.model is not None:
                model = reference if i == base else make(row).to(device)
                counts = count(model)
                check_removed(model)
                measured = {"params": counts.params, "macs": counts.macs, "top1": None, "batch": {}}
                for batch in batches:
                    measured["batch"][str(batch)] = _speed(model, reference, reference_macs / counts.macs, batch, device)
                if row.checkpoint in weights:
                    measured["top1"] = _accuracy(row, weights[row.checkpoint], data, device)
                out[-1]["measured"] = measured
            progress.advance()
    return {"rows": out, "notes": NOTES, "machine": machine(device), "dtype": "float32", "engine": "eager",
            "macs_convention": "fvcore; 1 MAC = 2 FLOPs", "base": rows[base].name, "batches": list(batches),
            "data": data, "checkpoints": {k: str(v) for k, v in weights.items()}}


def _speed(model: nn.Module, reference: nn.Module, flops_ratio: float, batch: int, device: str) -> dict:
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(batch, *image_size(reference), generator=generator).to(device)
    b = torch.randn(batch, *image_size(model), generator=generator).to(device)
    with torch.inference_mode():
        times = interleave({"base": lambda: reference(a), "row": lambda: model(b)}, synchronise=synchronise)
    base, ms = (statistics.median(times[k]) for k in ("base", "row"))
    return {"images_per_s": 1e3 * batch / ms, "ms": ms, "range_ms": [min(times["row"]), max(times["row"])], "base_ms": base,
            "flops_ratio": flops_ratio, "speedup": base / ms, "realised_gain": base / ms / flops_ratio}


def _weights(rows: tuple[Row, ...], data: str | None, checkpoints: str | None) -> dict[str, Path]:
    if (data is None) != (checkpoints is None):
        raise ValueError("table1: data and checkpoints must be given together: top-1 needs pictures and trained weights")
    if data is None:
        return {}
    for name, folder in (("data", data), ("checkpoints", checkpoints)):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"table1: {name} must be a folder, got {folder!r}")
    names = [r.checkpoint for r in rows if r.checkpoint]
    found = {n: p for n in names for p in (Path(checkpoints, n + s) for s in ("", ".safetensors", ".pth")) if p.exists()}
    if not found:
        raise FileNotFoundError(f"table1: checkpoints must hold NAME.pth, NAME.safetensors or a saved folder NAME for a NAME of "
                                f"{', '.join(names)}; {checkpoints!r} has none")
    return found


def _accuracy(row: Row, path: Path, data: str, device: str) -> dict:
    import timm

    from .checkpoint import load
    from .evaluate import evaluate_source

    options = dict(row.options)
    if path.is_dir():
        model = load(path)
    elif "heads" in options:
        raise ValueError(f"table1: {path} must be a folder written by `vitprune.save`: its heads and hidden units are gone")
    elif "tokens" in options:
        model = load_dynamicvit(path, row.model, keep=options["tokens"])
    else:
        model = timm.create_model(row.model)
        load_weights(model, path)
    return evaluate_source(model.eval(), data, device)


def show(result: dict) -> None:
    """Print the table: with lines and colours on a terminal, plain elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    plain = not console.is_terminal
    if plain:
        console = Console(width=220, color_system=None)
    table = Table(title="Table 1: printed | true | measured here", box=box.ASCII if plain else box.SIMPLE_HEAVY, pad_edge=False)
    for name, justify in _columns(result["batches"]):
        table.add_column(name, justify=justify)
    for row in result["rows"]:
        table.add_row(*_cells(row, result["batches"]))
    console.print(table)
    m = result["machine"]
    console.print(f"{m.get('gpu', m.get('cpu'))}, {m['threads']} threads, torch {m['torch']}, {result['dtype']}, plain evaluation; "
                  f"medians of interleaved rounds beside {result['base']}. G: {result['macs_convention']}. "
                  "gain: speed-up over MAC ratio (1 = what the MACs promise).", soft_wrap=True, highlight=False)
    for key, text in result["notes"].items():
        console.print(f"[{key}] {text}", soft_wrap=True, highlight=False, markup=False)


def _columns(batches: list[int]) -> Iterator[tuple[str, str]]:
    yield "model", "left"
    for side in ("printed", "true"):
        for name in ("M", "G", "px", "top-1"):
            yield f"{side}\n{name}", "right"
    for name in ("M", "G", *(f"img/s b{b}" for b in batches), *(f"gain b{b}" for b in batches), "top-1"):
        yield f"here\n{name}", "right"
    yield "notes", "left"


def _cells(row: dict, batches: list[int]) -> list[str]:
    def shown(values: tuple | None, digits: tuple[int, int]) -> list[str]:
        values = values or (None,) * 4
        places = (*digits, 0, 2)
        return ["-" if v is None else f"{v:.{p}f}" for v, p in zip(values, places)]

    m = row["measured"]
    if m is None:
        here = ["-"] * (2 + 2 * len(batches)) + ["literature"]
    else:
        speeds = [m["batch"][str(b)] for b in batches]
        here = [f"{m['params'] / 1e6:.2f}", f"{m['macs'] / 1e9:.3f}", *(f"{s['images_per_s']:.1f}" for s in speeds),
                *(f"{s['realised_gain']:.2f}" for s in speeds),
                "not measured" if m["top1"] is None else f"{m['top1']['top1']:.2f}"]
    return [row["name"], *shown(row["printed"], (1, 3 if (row["printed"] or (0, 9))[1] < 1 else 1)), *shown(row["true"], (2, 3)), *here,
            " ".join(row["notes"])]
