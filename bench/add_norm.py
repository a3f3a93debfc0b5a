"""add_norm, forward and backward, beside what PyTorch has: `python -m bench.add_norm [DEVICE]` prints JSON."""
import json
import statistics
import sys

import torch
from torch.nn import functional as F

from vitprune.bench import DTYPES, interleave, machine
from vitprune.ops import add_norm, backend, registry

CHANNELS = {"tiny": 192, "small": 384, "base": 768}  # DeiT
KEEPS = {1.0: 197, 0.9: 178, 0.8: 158, 0.7: 138, 0.6: 119, 0.5: 99, 0.4: 79}  # tokens: int(196 * keep) patches and the class token
FORWARD, BACKWARD = 4, 5  # tensors of [B, N, C] moved: x, residual, s, y; ds, dy, s, dx, dresidual (no LayerScale)


def shapes(device: torch.device):
    if device.type != "cuda":
        return [(B, 197, C) for B in (1, 8) for C in (192, 384)]
    return [(B, N, C) for C in CHANNELS.values() for B in (1, 8, 32, 128, 512, 1024)
            for N in (KEEPS.values() if B in (1, 128) else (197, 138))]


def candidates(device: torch.device, dtype: torch.dtype) -> dict:
    """Name -> function, or the reason why there is none."""
    found = {"eager": lambda x, r, w, b: (s := x + r, F.layer_norm(s, s.shape[-1:], w, b, 1e-6))}
    found["compiled"] = torch.compile(found["eager"], dynamic=False)
    for name, reason in registry.table("add_norm", device, dtype).items():
        if name == "triton":
            def run(x, r, w, b, name=name):
                with backend(name):
                    return add_norm(x, r, w, b, 1e-6)
            found[name] = reason or run
    return found


def calls(functions: dict, args: list, ups: list, backward: bool) -> tuple[dict, dict]:
    """(what can be called, why the rest cannot)."""
    ready, refused = {}, {}
    for name, function in functions.items():
        def call(function=function):
            out = function(*args)
            return torch.autograd.grad(out, args, ups, allow_unused=True) if backward else out
        try:
            if isinstance(function, str):
                raise RuntimeError(function)
            call()
            ready[name] = call
        except Exception as e:  # what fails here is a reason, not the end of the table
            refused[name] = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
    return ready, refused


def rows(device: torch.device, min_time: float = 0.05):
    """A row a shape, dtype and direction: milliseconds, bytes that must move, and the share of the bandwidth of a copy."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for kind in ("float32", "bfloat16") if device.type != "cuda" else DTYPES:
        functions = candidates(device, DTYPES[kind])
        for B, N, C in shapes(device):
            torch._dynamo.reset()  # one shape's graphs do not count against the next one's
            x, r, *ups = (torch.randn(B, N, C, device=device).to(DTYPES[kind]) for _ in range(4))
            w, b = (torch.randn(C, device=device).to(DTYPES[kind]) for _ in range(2))
            args, target = [t.requires_grad_() for t in (x, r, w, b)], torch.empty_like(x)
            for backward in (False, True):
                with torch.set_grad_enabled(backward):
                    ready, refused = calls(functions, args, ups, backward)
                    ready["copy"] = lambda x=x, target=target: target.copy_(x.detach())
                    times = interleave(ready, min_time=min_time, synchronise=synchronise)
                ms = {n: statistics.median(t) for n, t in times.items()}
                copied = 2 * x.nbytes
                moved = (FORWARD + (BACKWARD if backward else 0)) * x.nbytes
                yield {"B": B, "N": N, "C": C, "dtype": kind, "pass": "forward+backward" if backward else "forward",
                       "bytes": moved, "macs": 0, "ms": ms, "unavailable": refused,
                       "spread_ms": {n: [min(t), max(t)] for n, t in times.items()},
                       "share_of_copy_bandwidth": {n: (moved / t) / (copied / ms["copy"]) for n, t in ms.items() if n != "copy"}}


if __name__ == "__main__":
    where = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"machine": machine(str(where)), "device": str(where), "rows": list(rows(where))}, indent=2))
