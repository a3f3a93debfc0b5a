"""A training step of DynamicViT beside the same step in plain PyTorch: `python -m bench.train_step [DEVICE]` prints JSON.

DeiT-S, tokens 0.7, distilled from its dense form, every weight trained: forward, backward and update. Predictors keep 0.7 of what they
see, as trained ones do. "plain": every operator's reference and every gradient. "vitprune": what the trainer does on that device, on a
CPU with `sparse_backward` ("vitprune full": without), on a GPU without ("vitprune sparse": with). On a CPU all are also timed as
`vitprune train` runs them, with memory that is freed kept for the next step; that is a matter of the process, so all rows without it
come first.
"""
import functools

import torch

from bench.common import forced, main, timed
from vitprune import TokenPruning, prune
from vitprune.step import Run
from vitprune.train import TrainConfig, keep_memory


def steps(batch: int, device: torch.device) -> tuple[dict, str]:
    """Name -> a step, and their precision."""
    import timm
    torch.manual_seed(0)
    dense = timm.create_model("deit_small_patch16_224").to(device).eval()
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)

    def run(sparse: bool | None) -> Run:
        model = prune(dense, TokenPruning(0.7)).to(device)
        for predictor in model.score_predictor:
            predictor.out_conv[4].bias.data.copy_(torch.tensor([0.7, 0.3]).log())
        return Run(model, TrainConfig(backbone_frozen_epochs=0, sparse_backward=sparse), 1000, dense)
    other = {"vitprune full": run(False)} if device.type == "cpu" else {"vitprune sparse": run(True)}
    runs = {"plain": run(False), "vitprune": run(None), **other}
    calls = {name: functools.partial(r.step, 0, images, labels) for name, r in runs.items()}
    return calls | {"plain": forced("reference", calls["plain"])}, str(runs["plain"].dtype or torch.float32).removeprefix("torch.")


def rows(device: torch.device, min_time: float = 0.05):
    """A row a batch, in the precision that the trainer takes on that device."""
    cpu = device.type == "cpu"
    found = [{"model": "deit_small_patch16_224", "batch": batch, "pass": "training step"} for batch in ((8, 32) if cpu else (128,))]
    for kept in (False, True) if cpu else (False,):
        if kept:
            keep_memory()
        for row in found:
            calls, row["dtype"] = steps(row["batch"], device)
            for column, values in timed(calls, device, min_time, graph=False).items():
                row.setdefault(column, {}).update({name + ", memory kept" * kept: value for name, value in values.items()})
    yield from found


if __name__ == "__main__":
    main(rows)
