"""LayerNorm of whole rows held in registers, forward."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ceil_div, configs, power_of_2
from .add_norm import DTYPES, MAX_CHANNELS, as_rows, normalised
from .policy_attention import on

OP = "layer_norm"


@triton.jit(do_not_specialize=["R", "N"])
def layer_norm_kernel(x, weight, bias, y, R, N, x_batch, x_row, eps, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """grid (tiles of ROWS rows); x is [R / N, N, C]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < R)[:, None] & (channel < C)[None, :]
    value = tl.load(x + (row // N)[:, None] * x_batch + (row % N)[:, None] * x_row + channel[None, :], mask=inside, other=0.0)
    normal = normalised(value.to(tl.float32), weight, bias, channel, inside, eps, C)
    tl.store(y + row[:, None] * C + channel[None, :], normal.to(y.dtype.element_ty), mask=inside)


def default(dtype: torch.dtype, arch: int, *, C: int, R: int = 0) -> dict:
    """rows: of a program."""
    width = power_of_2(C)
    elements = 1024 if arch < 80 else 2048
    return {"rows": max(1, elements // width), "num_warps": min(16, 4 * max(1, width // 1024))}


def candidates(dtype: torch.dtype, arch: int, *, C: int, R: int = 0) -> list[dict]:
    """What is worth timing, the default first."""
    first, width = default(dtype, arch, C=C, R=R), power_of_2(C)
    found = [{"rows": max(1, elements // width), "num_warps": warps}
             for elements, warps in ((1024, 1), (1024, 2), (2048, 2), (4096, 4), (4096, 8))]
    return [first, *(c for i, c in enumerate(found) if c != first and c not in found[:i])]


def refuses(device: torch.device, dtype: torch.dtype, *, weight: torch.dtype = torch.float32, wide: bool = False, grad: bool = False,
            autocast: bool = False, **_) -> str | None:
    """Why `launch` cannot serve, or None. dtype: of x; weight: its dtype; wide: C > MAX_CHANNELS; autocast: whether it is on."""
    if grad:
        return "forward only"
    if autocast:
        return "autocast computes LayerNorm in float32"
    for kind in (dtype, weight):
        if kind not in DTYPES:
            return f"no kernel for {kind}"
    return f"more channels than the {MAX_CHANNELS} that a program can hold" if wide else None


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, config: dict | None = None) -> Tensor:
    """`vitprune.ops.layer_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    C, R, arch = x.shape[-1], x.numel() // x.shape[-1], configs.capability(x.device)
    config = config or configs.nearest(OP, arch, x.dtype, (("R", R), ("C", C))) or default(x.dtype, arch, C=C, R=R)
    x = as_rows(x)
    with on(x.device):
        layer_norm_kernel[(ceil_div(R, config["rows"]),)](
            x, weight.contiguous(), bias if bias is None else bias.contiguous(), y, R, x.shape[1], *x.stride()[:2], eps,
            C=C, ROWS=config["rows"], CHANNELS=power_of_2(C), num_warps=config["num_warps"])
    return y
