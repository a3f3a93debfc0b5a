"""add_norm, forward and backward, beside what PyTorch has: `python -m bench.add_norm [DEVICE]` prints JSON."""
import torch
from torch.nn import functional as F

from bench.common import kernels, kinds, main, share_of_copy, timed
from vitprune import cases
from vitprune.bench import DTYPES
from vitprune.cases import BATCHES, HEADS, Size, calls
from vitprune.ops import add_norm

CHANNELS = {name: 64 * heads for name, heads in HEADS.items()}  # DeiT
KEEPS = {keep: Size(1, 1, keep).kept for keep in cases.KEEPS}  # tokens
FORWARD, BACKWARD = 4, 4  # tensors of [B, N, C] moved: x, residual, s, y; ds, dy, s, dx (no LayerScale: the residual's gradient is x's)


def shapes(device: torch.device, brief: bool):
    if device.type != "cuda":
        return [(1, 197, 384), (8, 197, 192)] if brief else [(B, 197, C) for B in (1, 8) for C in (192, 384)]
    if brief:
        return [(1, 138, 384), (128, 138, 768), (128, 138, 384), (1, 138, 768)]
    return [(B, N, C) for C in CHANNELS.values() for B in BATCHES for N in (KEEPS.values() if B in (1, 128) else (197, 138))]


def candidates(device: torch.device, dtype: torch.dtype) -> dict:
    """Name -> function, or the reason why there is none."""
    found = {"eager": lambda x, r, w, b: (s := x + r, F.layer_norm(s, s.shape[-1:], w, b, 1e-6))}
    found["compiled"] = torch.compile(found["eager"], dynamic=False)
    return found | kernels("add_norm", device, dtype, lambda x, r, w, b: add_norm(x, r, w, b, 1e-6))


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a shape, dtype and direction: milliseconds, bytes that must move, and the share of the bandwidth of a copy."""
    for kind in kinds(device, brief):
        functions = candidates(device, DTYPES[kind])
        for B, N, C in shapes(device, brief):
            torch._dynamo.reset()  # one shape's graphs do not count against the next one's
            args = cases.inputs("add_norm", Size(B, C // 64, tokens=N), device, DTYPES[kind])[1]
            x, target, ups = args[0], torch.empty_like(args[0]), [torch.randn_like(args[0]) for _ in range(2)]
            args = [t.requires_grad_() for t in args]
            for backward in (False, True):
                with torch.set_grad_enabled(backward):
                    ready, refused = calls(functions, args, ups, backward)
                    ready["copy"] = lambda x=x, target=target: target.copy_(x.detach())
                    row = {"B": B, "N": N, "C": C, "dtype": kind, "pass": "forward+backward" if backward else "forward",
                           "bytes": (FORWARD + (BACKWARD if backward else 0)) * x.nbytes, "macs": 0, "copied": 2 * x.nbytes,
                           **timed(ready, device, min_time), "unavailable": refused}
                yield row | share_of_copy(row)


if __name__ == "__main__":
    main(rows)
