"""select_tokens, every backend that can run here, side by side: `python -m bench.select_tokens [DEVICE]` prints JSON."""
import torch

from bench.common import forced, kinds, main, times
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


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a shape and dtype: milliseconds of every backend and of the compiled reference, and bytes that must move."""
    for kind in kinds(device, brief):
        for size in shapes(device, brief):
            torch._dynamo.reset()
            function, args = cases.inputs("select_tokens", size, device, DTYPES[kind])
            functions = {name: reason or forced(name, function)
                         for name, reason in registry.table("select_tokens", device, DTYPES[kind], scores=DTYPES[kind]).items()}
            functions["compiled_reference"] = forced("reference", torch.compile(function, dynamic=False))
            with torch.inference_mode():
                ready, refused = calls(functions, args, [], False)
                ms, spread = times(ready, device, min_time)
            x, scores = args
            yield {"B": size.B, "N": size.tokens - 1, "K": size.kept - 1, "C": x.shape[2], "dtype": kind,
                   "bytes": 2 * size.B * size.kept * x.shape[2] * x.element_size() + scores.nbytes + 8 * size.B * (size.kept - 1),
                   "macs": 0, "ms": ms, "spread_ms": spread, "unavailable": refused}


if __name__ == "__main__":
    main(rows)
