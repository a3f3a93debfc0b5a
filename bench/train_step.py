"""A training step of DynamicViT beside the same step in plain PyTorch: `python -m bench.train_step [DEVICE]` prints JSON.

DeiT-S, tokens 0.7, distilled from its dense form, every weight trained: forward, backward and update. On a CPU both are also timed
as `vitprune train` runs them, with memory that is freed kept for the next step; that is a matter of the process, so all rows
without it come first.
"""
import itertools

import torch

from bench.common import forced, main, timed
from vitprune import TokenPruning, prune
from vitprune.step import Run
from vitprune.train import TrainConfig, keep_memory


def steps(batch: int, amp: str, device: torch.device) -> dict:
    """Name -> a step; "plain" calls each operator's reference, "vitprune" what is chosen on this machine."""
    import timm
    torch.manual_seed(0)
    dense = timm.create_model("deit_small_patch16_224").to(device).eval()
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)
    run = Run(prune(dense, TokenPruning(0.7)).to(device), TrainConfig(backbone_frozen_epochs=0, amp=amp), 1000, dense)

    def step():
        run.step(0, images, labels)
    return {"plain": forced("reference", step), "vitprune": step}


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a precision and batch."""
    cuda = device.type == "cuda"
    found = [{"model": "deit_small_patch16_224", "batch": batch, "amp": amp, "ms": {}, "spread_ms": {}}
             for amp, batch in itertools.product(("auto",) if cuda else ("off",), (128,) if cuda else (8, 32))]
    for kept in (False,) if cuda else (False, True):
        if kept:
            keep_memory()
        for row in found:
            for column, values in timed(steps(row["batch"], row["amp"], device), device, min_time).items():
                row.setdefault(column, {}).update({name + ", memory kept" * kept: value for name, value in values.items()})
    yield from found


if __name__ == "__main__":
    main(rows)
