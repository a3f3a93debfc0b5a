"""CIFAR-10: a small vision transformer, dense and pruned in every way, each way beside its control.

`python -m bench.cifar10 --data FOLDER` (train.parquet and test.parquet, pictures and labels as in Hugging Face's `uoft-cs/cifar10`,
which is what is downloaded without --data). Rows that bench/results/cifar10.json already holds are not trained again.
"""
from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import vitprune
from vitprune.bench import machine
from vitprune.digits import TensorLoader
from vitprune.evaluate import evaluate
from vitprune.measure import count
from vitprune.train import TrainConfig, train

OUT = Path(__file__).parent / "results" / "cifar10.json"
MEAN, STD = 0.473, 0.251
TOKENS = vitprune.TokenPruning(0.7)
BLOCKS = vitprune.BlockPruning(budget=0.5, granularity=8, method="movement", schedule=vitprune.Cubic(0.05, 0.75))
PLANS = {  # name: (tokens, blocks)
    "blocks, movement": (None, BLOCKS), "blocks, random": (None, replace(BLOCKS, method="random")),
    "tokens 0.7": (TOKENS, None), "tokens 0.7, random": (replace(TOKENS, score="random"), None),
    "both in tandem": (TOKENS, BLOCKS), "both, random": (replace(TOKENS, score="random"), replace(BLOCKS, method="random")),
    "tokens 0.5": (replace(TOKENS, keep=0.5), None), "tokens 0.5, random": (replace(TOKENS, keep=0.5, score="random"), None)}

SMALL = "dense, fewer MACs"  # about half, trained as long as the dense model and its pruned form together


def read(folder: str | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{"train", "test"}: pictures uint8 [M, 3, 32, 32] and labels [M]."""
    import datasets
    from PIL import Image

    out = {}
    for split in ("train", "test"):
        rows = datasets.load_dataset("uoft-cs/cifar10", split=split) if folder is None else \
            datasets.Dataset.from_parquet(str(Path(folder) / f"{split}.parquet"))
        image = "image" if "image" in rows.column_names else "img"
        rows = rows.cast_column(image, datasets.Image(decode=False))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in rows[image]])
        out[split] = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"])
    return out


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each picture [B, 3, 32, 32] moved by up to 4 pixels and mirrored half of the time."""
    B = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, B, 1), generator=generator)
    rows, columns = top + torch.arange(32), left + torch.arange(32)
    columns = torch.where(torch.rand(B, 1, generator=generator) < 0.5, columns, columns.flip(1))
    batch = torch.arange(B)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def vit(width: int, depth: int, seed: int) -> VisionTransformer:
    """32x32 pictures, patch 4, head width 16."""
    torch.manual_seed(seed)
    return VisionTransformer(img_size=32, patch_size=4, num_classes=10, embed_dim=width, depth=depth, num_heads=width // 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of train.parquet and test.parquet; by default downloaded")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=6, help="of the dense model")
    parser.add_argument("--tune", type=int, default=1, help="epochs of every model pruned from it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--plans", nargs="+", default=[*PLANS, SMALL], help="rows, in order")
    parser.add_argument("--out", type=Path, default=OUT)
    o = parser.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    data = {split: (images.float() / 255, labels) for split, (images, labels) in read(o.data).items()}
    asked = {k: v for k, v in vars(o).items() if k not in ("data", "plans", "out", "seeds")}
    result = json.loads(o.out.read_text()) if o.out.exists() else {"config": asked, "machine": machine(o.device), "rows": []}
    if result["config"] != asked:
        raise SystemExit(f"{o.out} holds a run with {result['config']}: give the same arguments, or another --out")

    def loaders(batch: int, seed: int):
        (x, y), (tx, ty) = data["train"], data["test"]
        return (TensorLoader(x, y, batch, MEAN, STD, training=True, augmentation=crop_and_flip, seed=seed).to(o.device),
                TensorLoader(tx, ty, 500, MEAN, STD).to(o.device))

    def fit(name: str, seed: int, model, epochs: int, config: TrainConfig, teacher=None, warm: int = 0):
        done = next((r for r in result["rows"] if (r["name"], r["seed"]) == (name, seed)), None)
        path = o.out.with_name(f".cifar10-{name}-{seed}.pt")
        if done and not path.exists():
            return None
        model = model.to(o.device)
        if done:
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        config = replace(config, epochs=epochs, seed=seed, amp=o.amp, eval_every=1000, warmup_epochs=warm)
        pair, start = loaders(config.batch_size, seed), time.perf_counter()
        history = train(model, pair, config, teacher, on_epoch=lambda r: print(f"{name} seed {seed} {r}", flush=True))
        minutes, row = (time.perf_counter() - start) / 60, {"name": name, "seed": seed}
        if isinstance(model, vitprune.PrunedViT):
            masked, model = evaluate(model, pair[1])["top1"], vitprune.compact(model)
            row["top1_before_compact"] = masked
        counts = count(model.cpu().eval(), (3, 32, 32))
        accuracy = evaluate(model.to(o.device), pair[1])
        row |= {"params": counts.params, "macs": counts.macs, **accuracy, "epochs": epochs, "minutes": round(minutes, 2),
                "loss": history[-1]["loss"]}
        result["rows"].append(row)
        if teacher is None:
            torch.save(model.state_dict(), path)
        o.out.write_text(json.dumps(result, indent=1) + "\n")
        return model.eval()

    dense_config = TrainConfig(batch_size=125, lr=2e-3, backbone_lr_scale=1.0, backbone_frozen_epochs=0, train_embeddings=True)
    tune = replace(dense_config, lr=5e-4, score_lr=1e-3)  # over 240 steps while blocks leave: 0.2 of a mean sensitivity
    dense = fit("dense", 0, vit(o.width, o.depth, 0), o.epochs, dense_config, warm=1)
    for name in o.plans:  # a budget that runs out cuts rows, not seeds
        for seed in range(o.seeds):
            if name == SMALL:
                small = vit(max(16, round(o.width / math.sqrt(2) / 16) * 16), o.depth, seed)
                fit(name, seed, small, o.epochs + o.tune, dense_config, warm=1)
                continue
            tokens, blocks = PLANS[name]
            if tokens is not None:
                tokens = replace(tokens, at=(o.depth // 2 - 1, o.depth // 2, o.depth // 2 + 1))
            torch.manual_seed(seed)
            model = vitprune.prune(dense, tokens=tokens, blocks=None if blocks is None else replace(blocks, seed=seed))
            scale = 1.0 if tokens is None or tokens.score != "predictor" else 0.25
            config = replace(tune, lr=tune.lr / scale, backbone_lr_scale=scale, ramp_tokens=tokens is not None and blocks is not None)
            fit(name, seed, model, o.tune, config, dense)
    show(result)


def show(result: dict) -> None:
    """A line a model: parameters, MMACs, top-1 and its standard deviation over the seeds."""
    print(f"{'model':24}{'params':>10}{'MMACs':>8}{'top-1 %':>9}{'± seeds':>9}{'seeds':>7}")
    for name in dict.fromkeys(r["name"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["name"] == name]
        top1 = [r["top1"] for r in rows]
        spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "-"
        print(f"{name:24}{rows[0]['params']:>10,}{rows[0]['macs'] / 1e6:>8.2f}{statistics.mean(top1):>9.2f}{spread:>9}{len(top1):>7}")


if __name__ == "__main__":
    main()
