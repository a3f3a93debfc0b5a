"""The whole main job in minutes: train a small vision transformer on handwritten digits, prune it in every way, report."""
from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import bench, doctor, report
from .blocks import BlockPruning
from .digits import DIGITS_HELD_OUT, load_digits
from .evaluate import evaluate
from .learned import Cubic
from .measure import count
from .progress import Progress
from .surgery import compact, prune
from .tokens import TokenPruning
from .train import TrainConfig, train

DENSE, LEARNED, RANDOM = "dense", "low keep, learned", "low keep, random"


@dataclass(frozen=True)
class Recipe:
    """How the demo trains: the dense model, what is fine-tuned from it, and what is dropped."""
    dense: TrainConfig = TrainConfig(epochs=40, batch_size=64, lr=3e-3, warmup_epochs=3, backbone_lr_scale=1.0,
                                     backbone_frozen_epochs=0, train_embeddings=True)
    # At a rate of 5e-3 the predictors of the low keep rate came to keep every patch in 2 of 14 runs, at this one in none of 34.
    tokens: TrainConfig = TrainConfig(epochs=15, batch_size=64, lr=3e-3, warmup_epochs=3, backbone_lr_scale=0.25,
                                      backbone_frozen_epochs=0, train_embeddings=True, ratio_weight=20.0)
    blocks: TrainConfig = TrainConfig(epochs=4, batch_size=64, lr=2e-3, warmup_epochs=0, backbone_lr_scale=1.0,
                                      backbone_frozen_epochs=0, train_embeddings=True)
    both: TrainConfig = TrainConfig(epochs=20, batch_size=64, lr=3e-3, warmup_epochs=1, backbone_lr_scale=0.6,
                                    backbone_frozen_epochs=0, train_embeddings=True, ratio_weight=20.0, ramp_tokens=True)
    keep: float = 0.7
    at: tuple[int, ...] = (2, 3, 4)
    low_keep: tuple[int, ...] = (4,)
    low_at: tuple[int, ...] = (0,)
    budget: float = 0.5
    granularity: int = 16
    schedule: Cubic = Cubic(0.15, 0.7)

    def epochs(self, epochs: int) -> Recipe:
        """The same recipe with that many epochs for the dense model, and in proportion for the others."""
        def scaled(config: TrainConfig) -> TrainConfig:
            count = max(1, round(config.epochs * epochs / self.dense.epochs))
            return replace(config, epochs=count, warmup_epochs=min(config.warmup_epochs, count - 1))
        return replace(self, dense=scaled(self.dense), tokens=scaled(self.tokens), blocks=scaled(self.blocks),
                       both=scaled(self.both))

    def config(self, tokens: TokenPruning | None, blocks: BlockPruning | None) -> TrainConfig:
        """How a model with these prunings is fine-tuned; a control as what it controls."""
        return self.blocks if tokens is None else self.tokens if blocks is None else self.both


@dataclass(frozen=True)
class DemoConfig:
    """seed: of the first run; seeds: how many runs, counted up from it; epochs: of the dense model (None: the recipe's);
    output: where the HTML report goes; json: one JSON document on stdout; quick: few epochs, shorter timing."""
    seed: int = 0
    seeds: int = 1
    epochs: int | None = None
    output: str = "report.html"
    json: bool = False
    quick: bool = False

    def __post_init__(self):
        for name, ok in (("seeds", self.seeds >= 1), ("epochs", self.epochs is None or self.epochs >= 1)):
            if not ok:
                raise ValueError(f"DemoConfig: {name} must be >= 1, got {getattr(self, name)}")


def small_vit(seed: int) -> VisionTransformer:
    """A vision transformer for 8x8 digits: patch 2, 16 patches, 6 blocks of width 64, 4 heads, 256 hidden units."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=6, num_heads=4)
        nn.init.normal_(model.pos_embed, std=0.5)  # timm's 0.02 takes many more epochs to tell 16 positions apart
    return model


def experiment(seed: int, recipe: Recipe, device: str = "cpu",
               on_epoch: Callable[[str], None] = lambda text: None) -> tuple[list[dict], dict[str, nn.Module]]:
    """Trains and prunes with one seed; returns a row a model (name, params, macs, top1, top5, count, cpu_s) and the models.

    Every pruned model starts from the same dense one, which teaches it; a control has its counterpart's budget.
    """
    rows, models = [], {}

    def add(name: str, model: nn.Module, config: TrainConfig, teacher: nn.Module | None) -> nn.Module:
        start = time.process_time()
        training, held_out = load_digits(config.batch_size, seed)
        loaders = training.to(device), held_out.to(device)
        model = model.to(device)
        train(model, loaders, replace(config, seed=seed), teacher, on_epoch=lambda _: on_epoch(f"seed {seed}: {name}"))
        if teacher is not None:
            model = compact(model)  # the row is that of the model whose dropped blocks are physically gone
        counts = count(model.eval(), (1, 8, 8))
        models[name] = model
        rows.append({"name": name, "params": counts.params, "macs": counts.macs, **evaluate(model, held_out),
                     "cpu_s": time.process_time() - start})
        return model

    dense = add(DENSE, small_vit(seed), recipe.dense, None)
    for name, tokens, blocks in variants(recipe, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the predictors' weights
            model = prune(dense, tokens=tokens, blocks=blocks)
        add(name, model, recipe.config(tokens, blocks), dense)
    return rows, models


def variants(recipe: Recipe, seed: int) -> list[tuple[str, TokenPruning | None, BlockPruning | None]]:
    """(name, tokens, blocks) of every pruned model of the demo."""
    tokens = TokenPruning(recipe.keep, at=recipe.at)
    blocks = BlockPruning(budget=recipe.budget, method="movement", granularity=recipe.granularity, schedule=recipe.schedule, seed=seed)
    low = TokenPruning(recipe.low_keep, at=recipe.low_at)
    return [("tokens", tokens, None), ("random tokens", replace(tokens, score="random"), None),
            ("blocks", None, blocks), ("random blocks", None, replace(blocks, method="random")),
            ("both in tandem", tokens, blocks),
            (LEARNED, low, None), (RANDOM, replace(low, score="random"), None)]


def learning_shows(rows: list[dict]) -> dict:
    """How far learned tokens beat random ones at the low keep rate: difference of top-1 and its binomial standard error."""
    learned, random = (next(row for row in rows if row["name"] == name) for name in (LEARNED, RANDOM))
    variance = sum(row["top1"] * (100 - row["top1"]) / row["count"] for row in (learned, random))
    return {"difference": learned["top1"] - random["top1"], "standard_error": math.sqrt(variance)}


def summarise(runs: list[list[dict]]) -> list[dict]:
    """One row a model: top-1 is the mean over the runs, `spread` its standard deviation (None with one run)."""
    return [{**same[0], "top1": statistics.mean(row["top1"] for row in same),
             "top5": statistics.mean(row["top5"] for row in same), "cpu_s": sum(row["cpu_s"] for row in same),
             "spread": statistics.stdev(row["top1"] for row in same) if len(same) > 1 else None}
            for same in zip(*runs)]


def timing(quick: bool, device: str, say: Callable[[str], None] = lambda text: None) -> list[dict]:
    """DeiT-S with random weights, dense against each way to prune it, interleaved; a row a model and batch size."""
    rows = []
    for name, pruning in (("tokens", {"tokens": 0.7}), ("blocks", {"heads": 0.5, "hidden": 0.5}),
                          ("both", {"tokens": 0.7, "heads": 0.5, "hidden": 0.5})):
        say(f"timing DeiT-S: {name}")
        dense, pruned = bench.prepare("deit_small_patch16_224", **pruning)
        costs = {"dense_macs": count(dense).macs, "macs": count(pruned).macs}
        rows += [{"name": name, **costs, **bench.compare(dense, pruned, batch=batch, device=device, min_time=0.02 if quick else 0.5)}
                 for batch in ((1,) if quick else (1, 8))]
    return rows


def render(config: DemoConfig, result: dict, model: nn.Module) -> str:
    """The HTML report of `main`'s result; `model` is the token-pruned one, whose choices are drawn."""
    _, held_out = load_digits()
    images = held_out.images[:6]
    model = model.cpu().eval()
    kept = model.trace_tokens((images - held_out.mean) / held_out.std)
    accuracy = [(row["name"], row["macs"] / 1e6, row["top1"]) for row in result["models"]]
    sections = [
        ("Handwritten digits", report.table(result["models"], MODEL_COLUMNS) + _learning_text(result["learning"])),
        ("Accuracy against MACs", report.scatter(accuracy, "MMACs per picture", "top-1, %")),
        ("Patches kept", report.patches(images, kept, model.patch_embed.patch_size[0])
         + "<p class=note>Faded patches were dropped at that stage.</p>"),
        ("DeiT-S on this machine", report.table(result["timing"], TIMING_COLUMNS)
         + "<p class=note>Random weights; dense and pruned interleaved, medians; realised gain is speed-up over MAC ratio.</p>"),
    ]
    for batch in sorted({row["batch"] for row in result["timing"]}):
        rows = [row for row in result["timing"] if row["batch"] == batch]
        speeds = [("dense", rows[0]["dense_macs"] / 1e9, 1e3 * batch / rows[0]["dense_ms"]),
                  *((row["name"], row["macs"] / 1e9, 1e3 * batch / row["pruned_ms"]) for row in rows)]
        sections.append((f"Speed against MACs, batch {batch}", report.scatter(speeds, "GMACs per picture", "pictures/s")))
    facts = [{"fact": key, "value": value} for key, value in result["machine"].items() if value is not None]
    sections.append(("Machine", report.table(facts, {"fact": "", "value": ""})))
    return report.page("vitprune demo", sections)


MODEL_COLUMNS = {"name": "model", "params": "parameters", "macs": "MACs", "top1": "top-1, %", "spread": "± (seeds)", "count": "pictures"}
TIMING_COLUMNS = {"name": "pruned", "batch": "batch", "dense_ms": "dense, ms", "pruned_ms": "pruned, ms", "speedup": "speed-up",
                  "flops_ratio": "MAC ratio", "realised_gain": "realised gain"}


def _learning_text(learning: list[dict]) -> str:
    best = "; ".join(f"{one['difference']:+.2f} points ± {one['standard_error']:.2f}" for one in learning)
    return f"<p>Learned tokens against random ones at the low keep rate, with standard errors: {best}.</p>"


def main(config: DemoConfig = DemoConfig()) -> dict:
    """Runs the demo, writes the report and returns what it measured; prints it, as JSON where config.json."""
    report.pyplot()  # a missing extra is an error before the training, not after
    device = doctor.default_device()
    recipe = Recipe()
    epochs = config.epochs or (2 if config.quick else None)
    if epochs:
        recipe = recipe.epochs(epochs)
    configs = [recipe.dense, *(recipe.config(tokens, blocks) for _, tokens, blocks in variants(recipe, 0))]
    runs, drawn = [], None
    with Progress(config.seeds * sum(one.epochs for one in configs) + 3) as progress:
        def step(text: str) -> None:
            progress.say(text)
            progress.advance()

        for seed in range(config.seed, config.seed + config.seeds):
            rows, models = experiment(seed, recipe, device, step)
            runs.append(rows)
            drawn = drawn or models["tokens"]
        result = {"models": summarise(runs), "learning": [learning_shows(rows) for rows in runs],
                  "timing": timing(config.quick, device, step), "machine": bench.machine(device), "config": asdict(config)}
    report.write(config.output, render(config, result, drawn))
    if config.json:
        print(json.dumps(result))
    else:
        show(result, config.output)
    return result


def show(result: dict, output: str) -> None:
    """Prints the two tables on stdout."""
    print(f"{'model':18}{'params':>10}{'MMACs':>8}{'top-1 %':>9}   on {DIGITS_HELD_OUT} held-out pictures")
    for row in result["models"]:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.2f}"
        print(f"{row['name']:18}{row['params']:>10,}{row['macs'] / 1e6:>8.2f}{row['top1']:>9.2f}{spread}")
    for one in result["learning"]:
        print(f"low keep rate: learned beats random by {one['difference']:.2f} points (standard error {one['standard_error']:.2f})")
    print(f"\n{'DeiT-S':18}{'batch':>6}{'dense ms':>10}{'pruned ms':>11}{'speed-up':>10}{'MAC ratio':>11}{'realised':>10}")
    for row in result["timing"]:
        print(f"{row['name']:18}{row['batch']:>6}{row['dense_ms']:>10.2f}{row['pruned_ms']:>11.2f}{row['speedup']:>10.2f}"
              f"{row['flops_ratio']:>11.2f}{row['realised_gain']:>10.2f}")
    print(f"\nreport: {output}")
