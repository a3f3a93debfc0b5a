"""compact_tokens and expand_rows beside what PyTorch has: `python -m bench.compact_tokens [DEVICE]` prints JSON."""
import json
import statistics
import sys

import torch

from bench.add_norm import CHANNELS, calls
from vitprune.bench import DTYPES, interleave, machine
from vitprune.ops import backend, compact_tokens, expand_rows, registry

KEEPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def shapes(device: torch.device):
    if device.type != "cuda":
        return [(B, 197, C, 0.7) for B in (1, 8) for C in (192, 384)]
    return [(B, 197, C, keep) for C in CHANNELS.values() for B in (1, 8, 32, 128, 512, 1024)
            for keep in (KEEPS if B in (1, 128) else (0.7,))]


def forced(name: str, function, reason: str | None):
    def run(*args):
        with backend(name):
            return function(*args)
    return reason or run


def candidates(device: torch.device, dtype: torch.dtype) -> dict:
    """Operator -> name -> function, or the reason why there is none; `boolean_index` waits for the device, as it must."""
    compact = {"boolean_index": lambda x, keep: x[keep]}
    expand = {"boolean_index": lambda rows, starts, keep: rows.new_zeros(*keep.shape, rows.shape[1]).masked_scatter_(keep[..., None], rows)}
    for found, op, function in ((compact, "compact_tokens", lambda x, keep: compact_tokens(x, keep, capacity=keep.numel())),
                                (expand, "expand_rows", expand_rows)):
        for name, reason in registry.table(op, device, dtype).items():
            found[name] = forced(name, function, reason)
        found["compiled_reference"] = torch.compile(forced("reference", function, None), dynamic=False)
    return {"compact_tokens": compact, "expand_rows": expand}


def rows(device: torch.device, min_time: float = 0.05):
    """A row an operator, shape and dtype: milliseconds, bytes that must move, and the share of the bandwidth of a copy."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for kind in ("float32", "bfloat16") if device.type != "cuda" else DTYPES:
        functions = candidates(device, DTYPES[kind])
        for B, N, C, ratio in shapes(device):
            torch._dynamo.reset()
            x, keep = torch.randn(B, N, C, device=device).to(DTYPES[kind]), torch.rand(B, N, device=device) < ratio
            with torch.inference_mode():
                packed, starts = compact_tokens(x, keep, capacity=keep.numel())
                kept, target = int(starts[-1]), torch.empty_like(x)
                for op, args in (("compact_tokens", [x, keep]), ("expand_rows", [packed, starts, keep])):
                    ready, refused = calls(functions[op], args, [], False)
                    ready["copy"] = lambda x=x, target=target: target.copy_(x)
                    times = interleave(ready, min_time=min_time, synchronise=synchronise)
                    ms = {n: statistics.median(t) for n, t in times.items()}
                    moved = (kept + B * N) * C * x.element_size() + B * N  # what is kept is read, all rows are written
                    yield {"op": op, "B": B, "N": N, "C": C, "keep": ratio, "kept": kept, "dtype": kind, "bytes": moved, "macs": 0,
                           "ms": ms, "spread_ms": {n: [min(t), max(t)] for n, t in times.items()}, "unavailable": refused,
                           "share_of_copy_bandwidth": {n: (moved / t) / (2 * x.nbytes / ms["copy"]) for n, t in ms.items() if n != "copy"}}


if __name__ == "__main__":
    where = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"machine": machine(str(where)), "device": str(where), "rows": list(rows(where))}, indent=2))
