"""Which heads and hidden blocks movement pruning keeps, for benches and `vitprune tune`: `python -m bench.masks` trains and writes
vitprune/masks.json.

One block of DeiT's widths on the embedded digits, a run for each width and fraction; block ids as the trainer leaves them.
"""
import argparse
import json
from dataclasses import replace

import torch
from timm.models import VisionTransformer

from vitprune import BlockPruning, prune
from vitprune.cases import HEADS, KEEPS, MASKS
from vitprune.demo import Recipe
from vitprune.digits import load_digits
from vitprune.train import train

FRACTIONS = sorted({*KEEPS, 0.75, 0.25} - {1.0}, reverse=True)


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


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    masks = {str(64 * H): {str(f): trained(H, f) for f in FRACTIONS} for H in HEADS.values()}
    MASKS.write_text(json.dumps(masks) + "\n")
    print(MASKS.read_text())
