"""How much of a forward pass and of a training step each operator takes: `python -m bench.shares [DEVICE]` prints JSON.

Every call that a pruned DeiT makes (tokens 0.7; half of heads and hidden blocks masked, as movement pruning left them) is recorded
with its arguments and timed by itself, forward alone in evaluation and with its gradients in training; its share is of the whole
pass, timed beside it.
On a GPU evaluation is in float16 and training under the trainer's own autocast.
"""
import contextlib
import functools
from dataclasses import replace

import torch

from bench.common import main, times
from vitprune import BlockPruning, TokenPruning, cases, prune
from vitprune.ops import registry
from vitprune.step import Run
from vitprune.train import TrainConfig


@contextlib.contextmanager
def recorded():
    """{(operator, shapes): [calls, backend, arguments of the first]} of what is called inside, but not by another operator; arguments
    without their graph."""
    seen: dict[tuple, list] = {}
    tables, within = dict(registry.TABLES), []

    def watch(op, backend):
        def run(*args):
            shape = tuple(tuple(a.shape) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args)
            kept = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
            if not within:
                seen.setdefault((op, shape), [0, backend, kept])[0] += 1
            within.append(op)
            try:
                return backend.run(*args)
            finally:
                within.pop()
        return replace(backend, run=run)

    registry.TABLES.update({op: {name: watch(op, b) for name, b in table.items()} for op, table in tables.items()})
    try:
        yield seen
    finally:
        registry.TABLES.update(tables)


def alone(op: str, backend, args, training: bool):
    """One call as the model makes it; in training with the gradients that the model asks for."""
    run = functools.partial(registry.call, op, backend.name)
    if not training:
        return lambda: run(*args)
    args = [a.detach().requires_grad_(a.requires_grad or not backend.composite and a.is_floating_point())  # a kernel sees no graph
            if isinstance(a, torch.Tensor) else a for a in args]
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def both():
        out = run(*args)
        out = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
        torch.autograd.grad(out, wanted, [torch.ones_like(t) for t in out], allow_unused=True)
    return both if wanted else lambda: run(*args)


def shares(name: str, batch: int, device: torch.device, training: bool) -> dict:
    """Milliseconds of the whole pass, "all", and of each operator's calls in it together."""
    import timm
    torch.manual_seed(0)
    dense = timm.create_model(name).to(device).eval()
    model = prune(dense, TokenPruning(0.7), BlockPruning()).to(device).eval()
    for block in model.blocks:
        block.attn.set_live(cases.live(model.embed_dim, 0.5, "heads").tolist())
        block.mlp.set_live(cases.live(model.embed_dim, 0.5, "hidden").tolist())
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    trainer = Run(model, TrainConfig(backbone_frozen_epochs=0), 1000, dense) if training else None
    kind = trainer.dtype if training else torch.float16 if device.type == "cuda" else None
    if not training and kind is not None:
        model, images = model.to(kind), images.to(kind)
    cast = torch.autocast(device.type, kind, enabled=training and kind is not None)  # as the trainer runs every call

    def whole():
        with contextlib.nullcontext() if training else torch.inference_mode():
            return trainer.step(0, images, labels) if training else model(images)

    with recorded() as seen:
        whole()
    functions = {key: alone(key[0], backend, args, training) for key, (_, backend, args) in seen.items()}

    def under(function):
        def run():
            with cast:
                return function()
        return run
    with contextlib.nullcontext() if training else torch.inference_mode():
        ms, spread = times({"all": whole, **{key: under(function) for key, function in functions.items()}}, device, 0.02)
    row = {"model": name, "batch": batch, "dtype": str(kind or torch.float32).removeprefix("torch."),
           "pass": "training step" if training else "forward", "calls": {}, "ms": {"all": ms["all"]}, "spread_ms": {"all": spread["all"]},
           "share": {}}
    for op in sorted({op for op, _ in seen}):
        count = {key: calls for key, (calls, *_) in seen.items() if key[0] == op}
        row["calls"][op] = sum(count.values())
        row["ms"][op] = sum(ms[key] * n for key, n in count.items())
        row["spread_ms"][op] = [sum(spread[key][end] * n for key, n in count.items()) for end in (0, 1)]
        row["share"][op] = row["ms"][op] / ms["all"]
    return row


def rows(device: torch.device):
    """Rows over DeiT-S and DeiT-B, in evaluation and in training; half the batch where the card has too little memory."""
    one, many = (1, 128) if device.type == "cuda" else (1, 8)
    for training, batch in ((False, many), (True, many), (False, one)):  # a bench that is stopped has those that matter most
        for name in ("deit_small_patch16_224", "deit_base_patch16_224"):
            left = batch
            while left:
                try:
                    row = shares(name, left, device, training)
                except torch.OutOfMemoryError:
                    left //= 2
                else:
                    yield row
                    break


if __name__ == "__main__":
    main(rows)
