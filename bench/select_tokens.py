"""select_tokens, alone and with the norm that follows, beside PyTorch's calls: `python -m bench.select_tokens [DEVICE]` prints JSON."""
import functools

import torch
from torch.nn import functional as F

from bench.common import forced, kinds, main, share_of_limit, timed
from vitprune import cases
from vitprune.bench import DTYPES
from vitprune.cases import BATCHES, HEADS, KEEPS, Size, calls
from vitprune.ops import registry


def shapes(device: torch.device, brief: bool) -> list[Size]:
    if device.type != "cuda":
        return [Size(B, H, 0.7) for B, H in ((1, 6), (8, 6), (1, 12), (8, 12), (32, 12))]
    if brief:
        return [Size(B, H, 0.7) for B, H in ((1, 6), (128, 12), (128, 6), (1, 12), (32, 12), (8, 12))]
    return [Size(B, H, keep) for H in HEADS.values() for B in BATCHES for keep in (KEEPS[1:] if B in (1, 128) else (0.7,))]


def argsort(x, scores, k: int):
    """As DynamicViT's own code selects: the whole order, indices with the class token's, one gather."""
    ids = torch.argsort(scores, dim=1, descending=True)[:, :k]
    rows = torch.cat([torch.zeros_like(ids[:, :1]), ids + 1], dim=1)
    return x.reshape(-1, x.shape[2])[(rows + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]).flatten()].view(
        x.shape[0], k + 1, x.shape[2])


def normed(function, x, scores, weight):
    out = function(x, scores)
    return F.layer_norm(out[0] if isinstance(out, tuple) else out, x.shape[2:], weight, weight, 1e-6)


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """Rows a shape and dtype, the selection alone and with the norm: milliseconds of every backend, of PyTorch's forms and of the norm of
    the same output alone; bytes that must move."""
    for kind in kinds(device, brief):
        for size in shapes(device, brief):
            torch._dynamo.reset()
            function, args = cases.inputs("select_tokens", size, device, DTYPES[kind])
            functions = {name: reason or forced(name, function)
                         for name, reason in registry.table("select_tokens", device, DTYPES[kind], scores=DTYPES[kind]).items()}
            functions["argsort, gather"] = functools.partial(argsort, k=size.kept - 1)
            x, scores = args
            weight = torch.ones_like(x[0, 0])
            moved = 2 * size.B * size.kept * x.shape[2] * x.element_size() + scores.nbytes + 8 * size.B * (size.kept - 1)
            for op, inputs in (("select_tokens", args), ("select_tokens, norm", [*args, weight])):
                if len(inputs) == 3:
                    functions = {n: f if isinstance(f, str) else functools.partial(normed, f) for n, f in functions.items()}
                plain = functools.partial(normed, function) if len(inputs) == 3 else function
                functions["compiled_reference"] = forced("reference", torch.compile(plain, dynamic=False))
                with torch.inference_mode():
                    ready, refused = calls(functions, inputs, [], False)
                    if len(inputs) == 3:
                        kept = function(x, scores)[0]
                        ready["norm alone"] = functools.partial(F.layer_norm, kept, kept.shape[2:], weight, weight, 1e-6)
                    row = {"op": op, "B": size.B, "N": size.tokens - 1, "K": size.kept - 1, "C": x.shape[2], "dtype": kind, "bytes": moved,
                           "macs": 0, **timed(ready, device, min_time), "unavailable": refused}
                yield row | share_of_limit(device, row)


if __name__ == "__main__":
    main(rows)
