"""sliced_mlp and sliced_linear beside PyTorch's calls: `python -m bench.sliced_mlp [DEVICE]` prints JSON."""
import functools

import torch
from torch.nn import functional as F

from bench import masks
from bench.common import forced, kernels, kinds, main, share_of_limit, timed
from vitprune.bench import DTYPES
from vitprune.cases import HEADS, calls
from vitprune.ops import sliced_linear, sliced_mlp
from vitprune.ops.sliced_linear import block_index

FRACTIONS = (0.5, 0.25, 1.0, 0.75)  # a bench that is stopped has those that matter most


def shapes(device: torch.device, brief: bool):
    """(rows, width): tokens of a batch of DeiT."""
    if device.type != "cuda":
        return [(197, 384), (8 * 197, 384)]
    return [(B * 197, 64 * H) for H in ([12] if brief else HEADS.values()) for B in ((128, 1) if brief else (1, 8, 32, 128, 512))]


def mlp(x, w1, b1, w2, b2, residual, live):
    return sliced_mlp(x, w1, b1, w2, b2, live, residual=residual)


def heads(x, w1, b1, w2, b2, residual, live):
    """The projections of attention: in over live heads, out over live heads. The weights of the MLP serve: 4 C rows, C columns."""
    return sliced_linear(sliced_linear(x, w1, b1, live, side="out"), w2, b2, live, side="in")


def compacted(x, w1, b1, w2, b2, residual, live, block: bool):
    """PyTorch's calls where the live weights lie side by side already (gathered before the clock starts). block: an MLP's, with its GELU
    and residual."""
    y = F.linear(x, w1, b1)
    return residual + F.linear(F.gelu(y), w2, b2) if block else F.linear(y, w2, b2)


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


def bind(function, live):
    return lambda *args: function(*args, live)


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a shape, live fraction, dtype and direction: milliseconds, bytes that must move, MACs, and the share of the card's limit."""
    for kind in kinds(device, brief):
        for (M, C), fraction, operator in ((s, f, o) for s in shapes(device, brief) for f in FRACTIONS for o in (mlp, heads)):
            torch._dynamo.reset()
            live = masks.live(C, fraction).to(device)
            index = block_index(live, 64)
            live = None if fraction == 1 and operator is mlp else live  # nothing pruned, or compacted: no list to follow
            random = functools.partial(torch.randn, device=device, dtype=DTYPES[kind])
            full = [random(M, C), random(4 * C, C) / C ** 0.5, random(4 * C), random(C, 4 * C) / C ** 0.5, random(C), random(M, C)]
            small = [full[0], full[1][index], full[2][index], full[3][:, index].contiguous(), *full[4:]]
            for backward in (False, True):
                ready, refused = {}, {}
                for name, (f, compact) in candidates(operator, device, DTYPES[kind]).items():
                    args = [t.detach().requires_grad_(backward) for t in (small if compact else full)]
                    call = f if isinstance(f, str) else bind(f, live)
                    with torch.set_grad_enabled(backward):
                        found = calls({name: call}, args, full[0], backward)
                    ready |= found[0]
                    refused |= found[1]
                with torch.set_grad_enabled(backward):
                    columns = timed(ready, device, min_time)
                weights = (2 * C + 1) * len(index) + C
                # Inputs, outputs and weights; what lies between could stay on chip.
                moved = full[0].element_size() * ((2 + (operator is mlp)) * M * C + weights + backward * (3 * M * C + 2 * weights))
                macs = 2 * M * C * len(index) * (3 if backward else 1)
                row = {"op": "sliced_mlp" if operator is mlp else "sliced_linear, out and in", "rows": M, "C": C, "live": fraction,
                       "dtype": kind, "pass": "forward+backward" if backward else "forward", "bytes": moved, "macs": macs, **columns,
                       "unavailable": {n: r[:160] for n, r in refused.items()}}
                yield row | share_of_limit(device, row)


if __name__ == "__main__":
    main(rows)
