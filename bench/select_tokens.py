"""select_tokens beside PyTorch's calls: `python -m bench.select_tokens [DEVICE]` prints JSON."""
import functools

import torch

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


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a shape and dtype: milliseconds of every backend and of PyTorch's forms; bytes that must move."""
    for kind in kinds(device, brief):
        for size in shapes(device, brief):
            torch._dynamo.reset()
            function, args = cases.inputs("select_tokens", size, device, DTYPES[kind])
            functions = {name: reason or forced(name, function)
                         for name, reason in registry.table("select_tokens", device, DTYPES[kind], scores=DTYPES[kind]).items()}
            functions["argsort, gather"] = functools.partial(argsort, k=size.kept - 1)
            functions["compiled_reference"] = forced("reference", torch.compile(function, dynamic=False))
            x, scores = args
            moved = 2 * size.B * size.kept * x.shape[2] * x.element_size() + scores.nbytes + 8 * size.B * (size.kept - 1)
            with torch.inference_mode():
                ready, refused = calls(functions, args, [], False)
                row = {"B": size.B, "N": size.tokens - 1, "K": size.kept - 1, "C": x.shape[2], "dtype": kind, "bytes": moved, "macs": 0,
                       **timed(ready, device, min_time), "unavailable": refused}
            yield row | share_of_limit(device, row)


if __name__ == "__main__":
    main(rows)
