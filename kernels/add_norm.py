"""Residual add and LayerNorm of whole rows held in registers; the gradient without atomics."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native.add_norm import outputs
from . import ceil_div, configs, power_of_2
from .policy_attention import on, rounded_product

OP = "add_norm"
MAX_CHANNELS = 4096  # a program holds whole rows in registers
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def statistics(s, inside, eps, C: tl.constexpr):
    """Normalised rows (0 outside) and 1 / standard deviation, in two passes over registers; what rounding made of the mean, which a row of
    nearly equal values shows a thousand times as large, is taken out with the second."""
    centred = tl.where(inside, s - (tl.sum(s, 1) / C)[:, None], 0.0)
    off = tl.sum(centred, 1) / C
    rstd = (1.0 / tl.sqrt(tl.maximum(tl.sum(rounded_product(centred, centred), 1) / C - off * off, 0.0) + eps))[:, None]
    return tl.where(inside, (centred - off[:, None]) * rstd, 0.0), rstd


@triton.jit
def normalised(s, weight, bias, channel, inside, eps, C: tl.constexpr):
    """LayerNorm of rows, in float32."""
    normal, _ = statistics(s, inside, eps, C)
    normal *= tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        normal += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    return normal


@triton.jit(do_not_specialize=["R", "N"])
def add_norm_kernel(
    x, residual, weight, bias, gamma, s, y,
    R, N, x_batch, x_row, residual_batch, residual_row, eps,
    C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """grid (tiles of ROWS rows); x and residual are [R / N, N, C]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    b, n = (row // N)[:, None], (row % N)[:, None]
    lane = channel < C
    inside = (row < R)[:, None] & lane[None, :]
    added = tl.load(residual + b * residual_batch + n * residual_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if gamma is not None:
        added *= tl.load(gamma + channel, mask=lane, other=0.0).to(tl.float32)[None, :]
    total = tl.load(x + b * x_batch + n * x_row + channel[None, :], mask=inside, other=0.0).to(tl.float32) + added
    total = total.to(s.dtype.element_ty)  # the norm is that of the sum returned: the gradient sees the same one
    out = row[:, None] * C + channel[None, :]
    tl.store(s + out, total, mask=inside)
    tl.store(y + out, normalised(total.to(tl.float32), weight, bias, channel, inside, eps, C).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "N", "P"])
def add_norm_backward_kernel(
    ds, dy, s, residual, weight, gamma, dx, dresidual, partial,
    R, N, P, ds_batch, ds_row, dy_batch, dy_row, s_batch, s_row, residual_batch, residual_row, eps,
    C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):
    """grid (P): every P-th tile of ROWS rows; partial [2 or 3, P, C] takes its sums for weight, bias and, where there is one, gamma;
    dresidual None: dx is the same."""
    channel = tl.arange(0, CHANNELS)
    lane = channel < C
    w = tl.load(weight + channel, mask=lane, other=0.0).to(tl.float32)[None, :]
    if gamma is not None:
        g = tl.load(gamma + channel, mask=lane, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, CHANNELS), tl.float32)
    dbias = tl.zeros((ROWS, CHANNELS), tl.float32)
    dgamma = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, R, P * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        b, n = (row // N)[:, None], (row % N)[:, None]
        inside = (row < R)[:, None] & lane[None, :]
        total = tl.load(s + b * s_batch + n * s_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(dy + b * dy_batch + n * dy_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        passed = tl.load(ds + b * ds_batch + n * ds_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        normal, rstd = statistics(total, inside, eps, C)
        dn = up * w
        dn = dn - (tl.sum(dn, 1) / C)[:, None] - normal * (tl.sum(dn * normal, 1) / C)[:, None]
        grad = dn * rstd + passed
        dweight += up * normal
        dbias += up
        out = row[:, None] * C + channel[None, :]
        tl.store(dx + out, grad.to(dx.dtype.element_ty), mask=inside)
        if gamma is not None:
            added = tl.load(residual + b * residual_batch + n * residual_row + channel[None, :], mask=inside, other=0.0)
            dgamma += tl.where(inside, grad * added.to(tl.float32), 0.0)
            grad *= g
        if dresidual is not None:
            tl.store(dresidual + out, grad.to(dresidual.dtype.element_ty), mask=inside)
    out = partial + tl.program_id(0).to(tl.int64) * C + channel
    vector = P.to(tl.int64) * C
    tl.store(out, tl.sum(dweight, 0), mask=lane)
    tl.store(out + vector, tl.sum(dbias, 0), mask=lane)
    if gamma is not None:
        tl.store(out + 2 * vector, tl.sum(dgamma, 0), mask=lane)


@triton.jit(do_not_specialize=["P"])
def sum_partials_kernel(partial, dweight, dbias, dgamma, P, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """grid (tiles of channels, 2 or 3): the sums over the programs, always in the same order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    kind = tl.program_id(1)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < P)[:, None] & (channel < C)[None, :]
        total += tl.load(partial + (kind * P + row).to(tl.int64)[:, None] * C + channel[None, :], mask=inside, other=0.0)
    value = tl.sum(total, 0).to(dweight.dtype.element_ty)
    if kind == 0:
        tl.store(dweight + channel, value, mask=channel < C)
    elif kind == 1:
        tl.store(dbias + channel, value, mask=channel < C)
    elif dgamma is not None:
        tl.store(dgamma + channel, value, mask=channel < C)


def default(dtype: torch.dtype, arch: int, *, C: int, R: int = 0) -> dict:
    """rows: of a program at a time; programs: at most so many in the gradient, each with a partial sum to write and to read; sum_rows: of
    those, added at a time."""
    width = power_of_2(C)
    elements = 1024 if arch < 80 else 2048
    first = {"rows": max(1, elements // width), "num_warps": 8 if width > elements else 4, "backward_rows": max(1, elements // width),
             "backward_warps": 16 if width > 2048 else 8, "backward_stages": 1, "programs": 512, "sum_rows": 256}
    if arch == 90:  # a row in a warp needs no barrier, and the next is loaded meanwhile; measured on an H200 alone
        warps = power_of_2(ceil_div(C, 768))
        first |= {"backward_rows": 1, "backward_warps": warps, "backward_stages": 2, "programs": 1320}
    return first


def candidates(dtype: torch.dtype, arch: int, *, C: int, R: int = 0) -> list[dict]:
    """What is worth timing, the default first."""
    first, width = default(dtype, arch, C=C, R=R), power_of_2(C)
    found = [first | {"rows": max(1, elements // width), "num_warps": warps}
             for elements, warps in ((1024, 2), (1024, 4), (4096, 4), (4096, 8))]
    found += [first | {"backward_rows": max(1, elements // width), "programs": programs, "backward_warps": warps, "backward_stages": stages}
              for elements, programs, warps, stages in ((1024, 1056, 2, 2), (1024, 1056, 4, 2), (2048, 528, 4, 2), (2048, 512, 8, 1))]
    found += [first | {"sum_rows": 1024}, first | {"sum_rows": 1024, "programs": 264}]
    return [first, *(c for i, c in enumerate(found) if c != first and c not in found[:i])]


def refuses(device: torch.device, dtype: torch.dtype, *, residual: torch.dtype = torch.float32, weight: torch.dtype = torch.float32,
            wide: bool = False, **_) -> str | None:
    """Why `launch` cannot serve, or None. dtype: of x; residual, weight: their dtypes; wide: C > MAX_CHANNELS."""
    for kind in (dtype, residual, weight):
        if kind not in DTYPES:
            return f"no kernel for {kind}"
    return f"more channels than the {MAX_CHANNELS} that a program can hold" if wide else None


def as_rows(t: Tensor) -> Tensor:
    """[batch, rows, C] with channels side by side; a copy only where strides do not allow it."""
    t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    return t if t.dim() == 3 else t.reshape(-1, *t.shape[-2:]) if t.dim() > 1 else t[None, None]


def _config(s: Tensor, R: int, C: int) -> dict:
    arch = configs.capability(s.device)
    return configs.nearest(OP, arch, s.dtype, (("R", R), ("C", C))) or default(s.dtype, arch, C=C, R=R)


def launch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, eps: float,
           config: dict | None = None) -> tuple[Tensor, Tensor]:
    """`vitprune.ops.add_norm`; both outputs have the dtype of the sum."""
    dtype = torch.result_type(x, residual)
    s = torch.empty(x.shape, dtype=dtype if gamma is None else torch.promote_types(dtype, gamma.dtype), device=x.device)
    y = torch.empty_like(s)
    if s.numel() == 0:
        return s, y
    C, R = x.shape[-1], s.numel() // x.shape[-1]
    config = config or _config(s, R, C)
    x, residual = as_rows(x), as_rows(residual)
    vectors = [t if t is None else t.contiguous() for t in (weight, bias, gamma)]
    with on(s.device):
        add_norm_kernel[(ceil_div(R, config["rows"]),)](
            x, residual, *vectors, s, y, R, x.shape[1], *x.stride()[:2], *residual.stride()[:2], eps,
            C=C, ROWS=config["rows"], CHANNELS=power_of_2(C), num_warps=config["num_warps"])
    return s, y


def launch_backward(ds: Tensor, dy: Tensor, s: Tensor, residual: Tensor, weight: Tensor, gamma: Tensor | None, eps: float,
                    config: dict | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`outputs` of vitprune/native/add_norm.py, written."""
    results = outputs(s, residual, weight, gamma)
    if s.numel() == 0:
        return results
    dx, dresidual, dweight, dbias, dgamma = (t if t.numel() else None for t in results)
    C, R = s.shape[-1], s.numel() // s.shape[-1]
    config = config or _config(s, R, C)
    ds, dy, s = as_rows(ds), as_rows(dy), as_rows(s)
    residual, gamma = (None, None) if gamma is None else (as_rows(residual), gamma.contiguous())
    weight, strided = weight.contiguous(), (ds, dy, s, s if residual is None else residual)
    programs = min(config["programs"], ceil_div(R, config["backward_rows"]))
    sums = 2 if gamma is None else 3
    partial = torch.empty(sums, programs, C, dtype=torch.float32, device=s.device)
    with on(s.device):
        add_norm_backward_kernel[(programs,)](
            ds, dy, s, residual, weight, gamma, dx, dresidual, partial, R, s.shape[1], programs,
            *(stride for t in strided for stride in t.stride()[:2]), eps,
            C=C, ROWS=config["backward_rows"], CHANNELS=power_of_2(C), STAGES=config["backward_stages"],
            num_warps=config["backward_warps"])
        channels = max(1, 8192 // config["sum_rows"])
        sum_partials_kernel[(ceil_div(C, channels), sums)](
            partial, dweight, dbias, dgamma, programs, C, ROWS=config["sum_rows"], CHANNELS=channels, num_warps=8)
    return results
