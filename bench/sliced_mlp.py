"""sliced_mlp beside PyTorch's calls: `python -m bench.sliced_mlp [DEVICE]` prints JSON; and what bench.sliced_linear shares with it."""
import functools

import torch
from torch.nn import functional as F

from bench.common import forced, kernels, kinds, main, share_of_limit, timed
from vitprune.bench import DTYPES
from vitprune.cases import HEADS, calls, live
from vitprune.ops import sliced_linear, sliced_mlp
from vitprune.ops.sliced_linear import block_index

FRACTIONS = (0.5, 0.25, 1.0, 0.75)  # a bench that is stopped has those that matter most


def shapes(device: torch.device, brief: bool):
    """(rows, width): tokens of a batch of DeiT."""
    if device.type != "cuda":
        return [(197, 384), (8 * 197, 384)]
    return [(B * 197, 64 * H) for H in ([12] if brief else HEADS.values()) for B in ((128, 1) if brief else (1, 8, 32, 128, 512))]


def mlp(x, w1, b1, w2, b2, residual, ids):
    return sliced_mlp(x, w1, b1, w2, b2, ids, residual=residual)


def heads(x, w1, b1, w2, b2, attended, ids):
    """The projections before and after attention, over live heads: w1 [3C, C], w2 [C, C]; attended: what attention gives the second; ids:
    blocks of q, k and v, and heads."""
    return sliced_linear(x, w1, b1, ids[0], side="out"), sliced_linear(attended, w2, b2, ids[1], side="in")


def compacted(x, w1, b1, w2, b2, other, _, block: bool):
    """PyTorch's calls where the live weights lie side by side already (gathered before the clock starts). block: an MLP's, with its GELU
    and residual; else the projections of attention."""
    y = F.linear(x, w1, b1)
    return other + F.linear(F.gelu(y), w2, b2) if block else (y, F.linear(other, w2, b2))


def candidates(operator, device: torch.device, dtype: torch.dtype) -> dict:
    """Name -> (function, whether it takes compacted weights), or the reason why there is none."""
    compact = functools.partial(compacted, block=operator is mlp)
    return {"gather, then library": (forced("reference", operator), False),
            "gather, compiled": (forced("reference", torch.compile(operator, dynamic=False)), False),
            "library on compacted": (compact, True), "compiled on compacted": (torch.compile(compact, dynamic=False), True),
            "max-autotune on compacted": (torch.compile(compact, dynamic=False, mode="max-autotune-no-cudagraphs"), True)
            if device.type == "cuda" else ("for GPUs", True),
            **{name: (function, False) for name, function in kernels(
                "sliced_mlp" if operator is mlp else "sliced_linear", device, dtype, operator).items()}}


def bind(function, ids):
    return lambda *args: function(*args, ids)


def prepared(operator, M: int, C: int, fraction: float, device: torch.device, dtype: torch.dtype):
    """(full arguments, compacted ones, ids of what is live, output, elements that a forward pass must move, those that its gradient must,
    MACs); what lies between two products could stay on chip."""
    block = operator is mlp
    ids = live(C, fraction, "hidden" if block else "heads").to(device)
    blocks = ids if block else torch.cat([ids + i * (C // 64) for i in range(3)])
    read, written = block_index(ids, 64), block_index(blocks, 64)  # columns of w2, rows of w1
    O, I = (4 * C, 4 * C) if block else (3 * C, C)  # noqa: E741
    random, L = functools.partial(torch.randn, device=device, dtype=dtype), len(read)
    full = [random(M, C), random(O, C) / C ** 0.5, random(O), random(C, I) / C ** 0.5, random(C), random(M, C if block else L)]
    small = [full[0], full[1][written], full[2][written], full[3][:, read].contiguous(), *full[4:]]
    out = compacted(*small, None, block)
    learns, given = (M * C, 2 * M * C) if block else 2 * (M * (C + L),)  # a residual's gradient is the output's
    results, weights = M * C if block else M * (C + len(written)), sum(t.numel() for t in small[1:5])
    forward, backward = given + results + weights, results + 2 * learns + 2 * weights
    ids = (blocks, ids) if not block else ids if fraction < 1 else None  # nothing pruned, or compacted: no list to follow
    return full, small, ids, out, forward, backward, M * C * (L + len(written))


def rows_of(operator, device: torch.device, min_time: float, brief: bool):
    """A row a shape, live fraction, dtype and direction: milliseconds, bytes that must move, MACs, and the share of the card's limit."""
    for kind in kinds(device, brief):
        for (M, C), fraction in ((s, f) for s in shapes(device, brief) for f in FRACTIONS):
            torch._dynamo.reset()
            full, small, ids, out, forward, gradient, macs = prepared(operator, M, C, fraction, device, DTYPES[kind])
            for backward in (False, True):
                ready, refused = {}, {}
                for name, (f, compact) in candidates(operator, device, DTYPES[kind]).items():
                    args = [t.detach().requires_grad_(backward) for t in (small if compact else full)]
                    call = f if isinstance(f, str) else bind(f, ids)
                    with torch.set_grad_enabled(backward):
                        found = calls({name: call}, args, out, backward)
                    ready |= found[0]
                    refused |= found[1]
                with torch.set_grad_enabled(backward):
                    columns = timed(ready, device, min_time)
                row = {"op": "sliced_mlp" if operator is mlp else "sliced_linear, out and in", "rows": M, "C": C, "live": fraction,
                       "dtype": kind, "pass": "forward+backward" if backward else "forward",
                       "bytes": full[0].element_size() * (forward + backward * gradient), "macs": macs * (3 if backward else 1), **columns,
                       "unavailable": {n: r[:160] for n, r in refused.items()}}
                yield row | share_of_limit(device, row)


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    yield from rows_of(mlp, device, min_time, brief)


if __name__ == "__main__":
    main(rows)
