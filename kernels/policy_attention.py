"""Attention under a key policy: scores stay on chip; of each row a maximum and a sum are kept for the backward pass."""
import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ceil_div, configs, power_of_2

OP = "policy_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTHS = range(16, 129, 16)
LOG2E = tl.constexpr(math.log2(math.e))
LIFT = tl.constexpr(10)  # weights are 2^LIFT as large on the way: no subnormals in float16 where they count beside eps
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """a b, added to acc unless that is None, in float32; Triton's interpreter multiplies the bits of bfloat16 and needs it wide."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded_product(a, b):
    """a * b, to be summed over lanes: multiplied into a sum, a lane's own product is rounded less than its neighbours', and lanes that hold
    the same sum come to differ."""
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def rows_of(x, b, h, row, n, s_batch, s_head, s_row, s_channel, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of one head [rows, WIDTH], zero past n rows and D channels; any strides, 64-bit offsets."""
    channel = tl.arange(0, WIDTH)
    at = x + b * s_batch + h * s_head + row.to(tl.int64)[:, None] * s_row + channel.to(tl.int64)[None, :] * s_channel
    return tl.load(at, mask=(row < n)[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def keep_rows(x, value, bh, row, n, s_row, D: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `rows_of` for a head that starts at x + bh, channels side by side."""
    channel = tl.arange(0, WIDTH)
    tl.store(x + bh + row.to(tl.int64)[:, None] * s_row + channel[None, :], value.to(x.dtype.element_ty),
             mask=(row < n)[:, None] & (channel < D)[None, :])


@triton.jit
def finite(x, kept):
    """x [rows, WIDTH] with what is not finite in dropped rows set to zero."""
    wide = x.to(tl.float32)
    return tl.where((kept > 0)[:, None] | (tl.abs(wide) < float("inf")), x, 0.0)


@triton.jit
def split(pid, N, H, SIZE: tl.constexpr):
    """(image, head, first row) of a program: the tiles of a head lie side by side."""
    tiles = tl.cdiv(N, SIZE)
    bh = pid // tiles
    return (bh // H).to(tl.int64), (bh % H).to(tl.int64), (pid % tiles) * SIZE


@triton.jit
def scale_of(scale):
    """The positive factor that takes scores to units of log 2, and the sign that queries take instead; never zero: -inf stays."""
    return tl.maximum(tl.abs(scale), 1e-30) * LOG2E, tl.where(scale < 0, -1.0, 1.0)


@triton.jit
def felt(total, eps, WIDE: tl.constexpr):
    """Whether eps is more of a row's sum than its output shows."""
    FELT: tl.constexpr = 2.0 ** -20 if WIDE else 2.0 ** -14
    return eps > FELT * (total + eps)


@triton.jit
def attend(
    query, k, v, policy, peak, total, mixed, acc, b, h, start, N, factor,
    k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel, p_batch, p_row,
    D: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr, LAST: tl.constexpr,
):
    """A step of `forward_kernel`: SIZE keys from `start` on, of which some may lie past the LAST; the diagonal as if it were not one."""
    col = start + tl.arange(0, SIZE)
    kept = tl.load(policy + b * p_batch + col.to(tl.int64) * p_row, mask=col < N, other=0.0).to(tl.float32)
    key = rows_of(k, b, h, col, N, k_batch, k_head, k_row, k_channel, D, WIDTH)
    value = rows_of(v, b, h, col, N, v_batch, v_head, v_row, v_channel, D, WIDTH)
    if not EPS:
        key, value = finite(key, kept), finite(value, kept)
    s = dot(query, tl.trans(key), None)
    if not EPS:
        s = tl.where((kept > 0)[None, :], s, float("-inf"))
    elif LAST:
        s = tl.where((col < N)[None, :], s, float("-inf"))
    higher = tl.maximum(peak, tl.max(s, 1))
    level = higher * factor - LIFT
    shrink = tl.exp2(peak * factor - LIFT - level)
    e = rounded_product(tl.exp2(s * factor - level[:, None]), kept[None, :])
    rounded = e.to(value.dtype)
    total = total * shrink + tl.sum(e, 1)
    mixed = mixed * shrink + tl.sum(rounded.to(tl.float32), 1)
    return higher, total, mixed, dot(rounded, value, acc * shrink[:, None])


@triton.jit(do_not_specialize=["N", "H"])
def forward_kernel(
    q, k, v, policy, out, m, z, N, H, scale, eps,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel, p_batch, p_row,
    D: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):
    """grid (B * H * tiles of QUERIES rows), each over every key, KEYS at a time and TAIL at the end; out [B, N, H, D], m (in units of
    log 2) and z [B, H, N]."""
    b, h, first = split(tl.program_id(0), N, H, QUERIES)
    row = first + tl.arange(0, QUERIES)
    factor, sign = scale_of(scale)
    query = rows_of(q, b, h, row, N, q_batch, q_head, q_row, q_channel, D, WIDTH)
    query = (query.to(tl.float32) * sign).to(query.dtype)
    mine = rows_of(k, b, h, row, N, k_batch, k_head, k_row, k_channel, D, WIDTH)
    own = tl.sum(rounded_product(query.to(tl.float32), mine.to(tl.float32)), 1)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32) if EPS else own
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES,), tl.float32)  # the sum of the weights as they enter the product, rounded: what the output is divided by
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    full = N // KEYS * KEYS
    for start in range(0, full, KEYS):
        peak, total, mixed, acc = attend(
            query, k, v, policy, peak, total, mixed, acc, b, h, start, N, factor, k_batch, k_head, k_row, k_channel,
            v_batch, v_head, v_row, v_channel, p_batch, p_row, D, WIDTH, EPS, KEYS, False)
    for start in tl.range(full, N, TAIL, num_stages=1):  # once at most; straight-line code spills
        peak, total, mixed, acc = attend(
            query, k, v, policy, peak, total, mixed, acc, b, h, start, N, factor, k_batch, k_head, k_row, k_channel,
            v_batch, v_head, v_row, v_channel, p_batch, p_row, D, WIDTH, EPS, TAIL, True)
    kept = tl.load(policy + b * p_batch + row.to(tl.int64) * p_row, mask=row < N, other=1.0).to(tl.float32)
    mine = rows_of(v, b, h, row, N, v_batch, v_head, v_row, v_channel, D, WIDTH)
    missing = tl.exp2((own - peak) * factor + LIFT) * (1.0 - kept)  # a token sees itself whole, whatever the others see of it
    total += missing
    acc += tl.where((missing != 0)[:, None], missing[:, None] * mine.to(tl.float32), 0.0)
    z_tile = total * 2.0 ** -LIFT
    if EPS:
        if tl.max(felt(z_tile, eps, query.dtype == tl.float32).to(tl.int32), 0) > 0:
            values = tl.zeros((WIDTH,), tl.float32)
            for start in range(0, N, KEYS):
                value = rows_of(v, b, h, start + tl.arange(0, KEYS), N, v_batch, v_head, v_row, v_channel, D, WIDTH)
                values += tl.sum(value.to(tl.float32), 0)
            acc += (eps / N * 2.0 ** LIFT) * values[None, :]
    keep_rows(out, acc / (mixed + missing + eps * 2.0 ** LIFT)[:, None], b * N * H * D + h * D, row, N, H * D, D, WIDTH)
    at = (b * H + h) * N + row
    tl.store(m + at, peak * factor, mask=row < N)
    tl.store(z + at, z_tile, mask=row < N)


def tail(N: int, step: int) -> int:
    """Rows of the last step, where N is no multiple of `step`: the power of two that holds the rest, 16 at least."""
    return max(16, power_of_2(N % step))


PASSES = ("", "dq_", "dk_")  # forward, gradient of queries, gradient of keys: each has tiles, warps and loads in flight of its own
NAMES = ("queries", "keys", "num_warps", "num_stages")


def default(dtype: torch.dtype, arch: int, **shape: int) -> dict:
    """Tiles, warps and loads in flight of each pass: what spills nowhere."""
    wide, narrow = shape["D"] > 64, shape["D"] <= 32
    if arch < 80:
        each = ((32, 16, 8, 1),) * 3 if narrow else ((16, 16 if wide else 32, 8, 1), *((16, 16, 8, 1),) * 2)
    elif dtype == torch.float32:
        each = ((16, 16, 8, 2),) * 3 if wide else ((32, 16, 4, 3),) * 3 if narrow else ((32, 32, 8, 3), (32, 16, 8, 3), (32, 16, 8, 3))
    else:
        warps = 8 if wide else 4
        each = ((64, 32, warps, 2 if wide else 3), (64, 64, 4, 1) if arch == 90 and not wide else (32, 32, warps, 3 if narrow else 2),
                (32 if wide or narrow else 64, 32, warps, 3 if arch == 90 and not wide and not narrow else 2))
    return {at + name: value for at, values in zip(PASSES, each) for name, value in zip(NAMES, values)}


def candidates(dtype: torch.dtype, arch: int, **shape: int) -> list[dict]:
    """What is worth timing, the default first."""
    first = default(dtype, arch, **shape)
    tiles = {"": ((64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 2), (32, 32, 2, 2), (64, 32, 4, 2)),
             "dq_": ((64, 32, 4, 2), (64, 64, 4, 2), (32, 32, 2, 2), (128, 32, 4, 2), (128, 64, 8, 2)),
             "dk_": ((32, 64, 4, 1), (64, 64, 4, 2), (32, 32, 2, 2), (32, 128, 4, 2), (64, 128, 8, 2))}
    found = [first | {at + name: value for name, value in zip(NAMES, tile)} for at, some in tiles.items() for tile in some]
    return [first, *(c for i, c in enumerate(found) if c != first and c not in found[:i])]


def refuses(device: torch.device, dtype: torch.dtype, *, fits: bool = True, **_) -> str | None:
    """Why `launch` cannot serve, or None. dtype: of q, k and v; fits: whether the heads' width is one of WIDTHS."""
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    return None if fits else f"the heads' width is not a multiple of 16 in {WIDTHS[0]}..{WIDTHS[-1]}"


def on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def in_float(q: Tensor) -> bool:
    """Whether to compute in float32: without matrix instructions Triton multiplies halves in ever more registers, and spills."""
    return configs.capability(q.device) < 80 and q.dtype != torch.float32


def configured(q: Tensor) -> dict:
    (B, H, N, D), arch = q.shape, configs.capability(q.device)
    return configs.nearest(OP, arch, q.dtype, (("B", B), ("H", H), ("N", N), ("D", D))) or default(q.dtype, arch, B=B, H=H, N=N, D=D)


def launch(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float,
           config: dict | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], laid out as [B, N, H, D]; row maxima (in units of log 2) and sums [B, H, N], float32."""
    B, H, N, D = q.shape
    if in_float(q):
        out, m, z = launch(q.float(), k.float(), v.float(), policy, scale, eps, config)
        return out.to(q.dtype), m, z
    out = torch.empty_strided((B, H, N, D), (N * H * D, D, H * D, 1), dtype=q.dtype, device=q.device)
    m, z = (torch.empty(B, H, N, dtype=torch.float32, device=q.device) for _ in range(2))
    config = config or configured(q)
    with on(q.device):
        forward_kernel[(B * H * ceil_div(N, config["queries"]),)](
            q, k, v, policy, out, m, z, N, H, scale, eps, *q.stride(), *k.stride(), *v.stride(), *policy.stride(),
            D=D, WIDTH=power_of_2(D), EPS=eps > 0, QUERIES=config["queries"], KEYS=config["keys"], TAIL=tail(N, config["keys"]),
            num_warps=config["num_warps"], num_stages=config["num_stages"])
    return out, m, z
