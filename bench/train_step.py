"""A training step of DynamicViT beside the same step in plain PyTorch: `python -m bench.train_step [DEVICE]` prints JSON.

DeiT-S, tokens 0.7, distilled from its dense form, every weight trained: forward, backward and update. On a CPU both are also timed
as `vitprune train` runs them, with memory that is freed kept for the next step; that is a matter of the process, so all rows
without it come first.
"""
import torch

from bench.common import forced, main, timed
from vitprune import TokenPruning, prune
from vitprune.step import Run
from vitprune.train import TrainConfig, keep_memory


def steps(batch: int, device: torch.device) -> tuple[dict, str]:
    """Name -> a step, "plain" with each operator's reference, "vitprune" with what is chosen on this machine; and their precision."""
    import timm
    torch.manual_seed(0)
    dense = timm.create_model("deit_small_patch16_224").to(device).eval()
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)
    run = Run(prune(dense, TokenPruning(0.7)).to(device), TrainConfig(backbone_frozen_epochs=0), 1000, dense)

    def step():
        run.step(0, images, labels)
    return {"plain": forced("reference", step), "vitprune": step}, str(run.dtype or torch.float32).removeprefix("torch.")


def rows(device: torch.device, min_time: float = 0.05):
    """A row a batch, in the precision that the trainer takes on that device."""
    cpu = device.type == "cpu"
    found = [{"model": "deit_small_patch16_224", "batch": batch, "pass": "training step"} for batch in ((8, 32) if cpu else (128,))]
    for kept in (False, True) if cpu else (False,):
        if kept:
            keep_memory()
        for row in found:
            calls, row["dtype"] = steps(row["batch"], device)
            for column, values in timed(calls, device, min_time).items():
                row.setdefault(column, {}).update({name + ", memory kept" * kept: value for name, value in values.items()})
    yield from found


if __name__ == "__main__":
    main(rows)
