"""Which heads and hidden blocks movement pruning keeps, for benches: `python -m bench.masks` trains and writes masks.json.

One block of DeiT's widths on the embedded digits, a run for each width and fraction; block ids as the trainer leaves them.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from timm.models import VisionTransformer

from vitprune import BlockPruning, prune
from vitprune.cases import HEADS
from vitprune.demo import Recipe
from vitprune.digits import load_digits
from vitprune.train import train

PATH = Path(__file__).with_name("masks.json")
FRACTIONS = (0.75, 0.5, 0.25)


def trained(H: int, fraction: float) -> dict[str, list[int]]:
    """Ids of the live heads and 64-wide hidden blocks of a block with H heads of 64 channels, after movement pruning to that fraction."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64 * H, depth=1, num_heads=H)
    recipe = Recipe()
    config = replace(recipe.blocks, epochs=3, lr=5e-4)
    train(model, load_digits(config.batch_size), config)
    pruned = prune(model, blocks=BlockPruning(heads=fraction, hidden=fraction, method="movement", schedule=recipe.schedule))
    train(pruned, load_digits(config.batch_size), config)
    block = pruned.blocks[0]
    return {"heads": block.attn.live.tolist(), "hidden": block.mlp.live.tolist()}


def live(C: int, fraction: float, what: str = "hidden") -> torch.Tensor:
    """The live "heads" or "hidden" blocks of a layer of C channels, int32 [L]; all for a fraction of 1."""
    return torch.arange({"heads": 1, "hidden": 4}[what] * C // 64, dtype=torch.int32) if fraction == 1 else \
        torch.tensor(json.loads(PATH.read_text())[str(C)][str(fraction)][what], dtype=torch.int32)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    masks = {str(64 * H): {str(f): trained(H, f) for f in FRACTIONS} for H in HEADS.values()}
    PATH.write_text(json.dumps(masks) + "\n")
    print(PATH.read_text())
