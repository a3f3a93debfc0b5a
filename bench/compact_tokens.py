"""compact_tokens and expand_rows beside what PyTorch has: `python -m bench.compact_tokens [DEVICE]` prints JSON."""
import torch

from bench.common import forced, kinds, main, share_of_copy, timed
from vitprune import cases
from vitprune.bench import DTYPES
from vitprune.cases import BATCHES, HEADS, KEEPS, Size, calls
from vitprune.ops import compact_tokens, expand_rows, registry


def shapes(device: torch.device, brief: bool):
    """(B, H, share of tokens kept)"""
    if device.type != "cuda":
        return [(1, 6, 0.7), (8, 6, 0.7)]
    if brief:
        return [(1, 6, 0.7), (128, 12, 0.7), (128, 6, 0.7), (1, 12, 0.7)]
    return [(B, H, keep) for H in HEADS.values() for B in BATCHES for keep in (KEEPS if B in (1, 128) else (0.7,))]


def candidates(device: torch.device, dtype: torch.dtype) -> dict:
    """Operator -> name -> function, or the reason why there is none; `boolean_index` waits for the device, as it must."""
    compact = {"boolean_index": lambda x, keep: x[keep]}
    expand = {"boolean_index": lambda rows, starts, keep: rows.new_zeros(*keep.shape, rows.shape[1]).masked_scatter_(keep[..., None], rows)}
    for found, op, function in ((compact, "compact_tokens", lambda x, keep: compact_tokens(x, keep, capacity=keep.numel())),
                                (expand, "expand_rows", expand_rows)):
        for name, reason in registry.table(op, device, dtype).items():
            found[name] = reason or forced(name, function)
        found["compiled_reference"] = forced("reference", torch.compile(function, dynamic=False))
    return {"compact_tokens": compact, "expand_rows": expand}


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row an operator, shape and dtype: milliseconds, bytes that must move, and the share of the bandwidth of a copy."""
    for kind in kinds(device, brief):
        functions = candidates(device, DTYPES[kind])
        for B, H, ratio in shapes(device, brief):
            torch._dynamo.reset()
            x, keep = cases.inputs("compact_tokens", Size(B, H, ratio), device, DTYPES[kind])[1]
            N, C = x.shape[1:]
            with torch.inference_mode():
                packed, starts = compact_tokens(x, keep, capacity=keep.numel())
                kept, target = int(starts[-1]), torch.empty_like(x)
                for op, args in (("compact_tokens", [x, keep]), ("expand_rows", [packed, starts, keep])):
                    ready, refused = calls(functions[op], args, [], False)
                    ready["copy"] = lambda x=x, target=target: target.copy_(x)
                    moved = (kept + B * N) * C * x.element_size() + B * N  # what is kept is read, all rows are written
                    row = {"op": op, "B": B, "N": N, "C": C, "keep": ratio, "kept": kept, "dtype": kind, "bytes": moved, "macs": 0,
                           "copied": 2 * x.nbytes, **timed(ready, device, min_time), "unavailable": refused}
                    yield row | share_of_copy(row)


if __name__ == "__main__":
    main(rows)
