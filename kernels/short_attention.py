"""Attention over short sequences, read from the fused qkv buffer: a dense batch, or packed rows with cu_seqlens."""
import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs

OP = "short_attention"
ONE_PASS = 256  # the most keys whose scores a program holds at once
WIDTHS = range(32, 129, 16)
LOG2E = math.log2(math.e)


@triton.jit
def _place(cu_seqlens, N, H, SPAN: tl.constexpr, PACKED: tl.constexpr):
    """What the program does: image, head, first row in its sequence; and that sequence's first row and length."""
    pid = tl.program_id(0)
    parts = tl.cdiv(N, SPAN)
    b = pid // (parts * H)
    if PACKED:
        base = tl.load(cu_seqlens + b).to(tl.int64)
        n = (tl.load(cu_seqlens + b + 1) - base).to(tl.int32)
    else:
        base = b.to(tl.int64) * N
        n = N
    return b.to(tl.int64), (pid // parts) % H, (pid % parts) * SPAN, base, n


@triton.jit
def _dot(a, b, acc, x, PRECISION: tl.constexpr):
    """acc + a b, with a and b rounded to the dtype of the buffer x."""
    a, b = a.to(x.dtype.element_ty), b.to(x.dtype.element_ty)
    if PRECISION == "wide":
        a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _load(x, row, n, row_stride, channel_stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of one head [rows, WIDTH]; zero past n rows and D channels."""
    channel = tl.arange(0, WIDTH)
    at = x + row.to(tl.int64)[:, None] * row_stride + channel.to(tl.int64)[None, :] * channel_stride
    return tl.load(at, mask=(row < n)[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _store(x, value, row, n, row_stride, D: tl.constexpr, WIDTH: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    at = x + row.to(tl.int64)[:, None] * row_stride + channel[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(row < n)[:, None] & (channel < D)[None, :])


@triton.jit
def _tiles(x, n, row_stride, channel_stride, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """KEYS rows as a tuple of tiles, one for each bit of KEYS: 208 is 128 + 64 + 16."""
    tiles = ()
    for i in tl.static_range(5):
        if KEYS & (256 >> i):
            row = KEYS // (512 >> i) * (512 >> i) + tl.arange(0, 256 >> i)
            tiles = tiles + (_load(x, row, n, row_stride, channel_stride, D, WIDTH),)
    return tiles


@triton.jit
def _scores(q, k, start, n, scale, x, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """In units of log 2; -inf past n keys."""
    s = _dot(q, tl.trans(k), tl.zeros((q.shape[0], SIZE), tl.float32), x, PRECISION) * scale
    return tl.where((start + tl.arange(0, SIZE) < n)[None, :], s, float("-inf"))


@triton.jit
def _all_scores(q, ks, n, scale, x, KEYS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr):
    """Scores against every key, a tuple of tiles, and their largest."""
    scores = ()
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    for i in tl.static_range(5):
        if KEYS & (256 >> i):
            s = _scores(q, ks[len(scores)], KEYS // (512 >> i) * (512 >> i), n, scale, x, 256 >> i, PRECISION)
            peak = tl.maximum(peak, tl.max(s, 1))
            scores = scores + (s,)
    return scores, peak


@triton.jit
def _zero_tail(out, cu_seqlens, b, B, T, part, parts, row_stride, QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows past the last sequence, shared out over all programs of a head."""
    zero = tl.zeros((QUERIES, WIDTH), out.dtype.element_ty)
    for start in range(tl.load(cu_seqlens + B) + (b * parts + part) * QUERIES, T, B.to(tl.int64) * parts * QUERIES):
        _store(out, zero, start + tl.arange(0, QUERIES), T, row_stride, D, WIDTH)


@triton.jit
def forward_kernel(
    qkv, out, cu_seqlens,
    B, T, N, H, scale, x_batch, x_row, x_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, LOOP: tl.constexpr, QUERIES: tl.constexpr, SPAN: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """grid (images * heads * parts of SPAN queries); keys in one pass over KEYS of them, or LOOP at a time."""
    b, head, first, base, n = _place(cu_seqlens, N, H, SPAN, PACKED)
    q_ptr = qkv + head.to(tl.int64) * D * x_channel
    out_ptr = out + head * D
    if PACKED:
        _zero_tail(out_ptr, cu_seqlens, b, B + tl.zeros((), tl.int32), T, first // SPAN, tl.cdiv(N, SPAN), H * D, QUERIES, D, WIDTH)
        q_ptr += base * x_row
    else:
        q_ptr += b * x_batch
    k_ptr = q_ptr + (H * D).to(tl.int64) * x_channel
    v_ptr = k_ptr + (H * D).to(tl.int64) * x_channel
    out_ptr += base * H * D
    if first < n:
        if LOOP == 0:
            ks = _tiles(k_ptr, n, x_row, x_channel, KEYS, D, WIDTH)
            vs = _tiles(v_ptr, n, x_row, x_channel, KEYS, D, WIDTH)
        for start in range(first, tl.minimum(first + SPAN, n), QUERIES):
            row = start + tl.arange(0, QUERIES)
            q = _load(q_ptr, row, n, x_row, x_channel, D, WIDTH)
            acc = tl.zeros((QUERIES, WIDTH), tl.float32)
            total = tl.zeros((QUERIES,), tl.float32)
            if LOOP == 0:
                scores, peak = _all_scores(q, ks, n, scale, qkv, KEYS, QUERIES, PRECISION)
                for i in tl.static_range(len(scores)):
                    p = tl.exp2(scores[i] - peak[:, None])
                    total += tl.sum(p, 1)
                    acc = _dot(p, vs[i], acc, qkv, PRECISION)
            else:
                peak = tl.full((QUERIES,), float("-inf"), tl.float32)
                for at in range(0, n, LOOP):
                    key = at + tl.arange(0, LOOP)
                    s = _scores(q, _load(k_ptr, key, n, x_row, x_channel, D, WIDTH), at, n, scale, qkv, LOOP, PRECISION)
                    higher = tl.maximum(peak, tl.max(s, 1))
                    shift = tl.where(higher == float("-inf"), 0.0, higher)
                    p, fade = tl.exp2(s - shift[:, None]), tl.exp2(peak - shift)
                    total = total * fade + tl.sum(p, 1)
                    v = _load(v_ptr, key, n, x_row, x_channel, D, WIDTH)
                    acc = _dot(p, v, acc * fade[:, None], qkv, PRECISION)
                    peak = higher
            _store(out_ptr, acc / total[:, None], row, n, H * D, D, WIDTH)


def refuses(device: torch.device, dtype: torch.dtype, *, head_dim: int = 64, **_) -> str | None:
    """Why `launch` cannot serve, or None."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {dtype}"
    if head_dim not in WIDTHS:
        return f"head_dim {head_dim} is not a multiple of 16 in {WIDTHS[0]}..{WIDTHS[-1]}"
    return None


def default(dtype: torch.dtype, arch: int, **shape) -> dict:
    """queries: rows of a tile; spans: tiles a program does one after the other; keys: 0 for one pass, or those of a step."""
    if dtype == torch.float32 or arch < 80:
        return {"queries": 16, "spans": 1, "keys": 16, "num_warps": 4, "num_stages": 1}
    one = shape.get("N", 197) <= ONE_PASS
    return {"queries": 64, "spans": 1, "keys": 0 if one else 64, "num_warps": 4, "num_stages": 2}


def _arguments(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[tuple, dict]:
    """(B, T, N, H) and the constants that every kernel takes."""
    D = qkv.shape[-1] // (3 * num_heads)
    packed = cu_seqlens is not None
    B, N = (cu_seqlens.shape[0] - 1, max_seqlen) if packed else qkv.shape[:2]
    return (B, qkv.shape[0] if packed else B * N, N, num_heads), {
        "D": D, "WIDTH": triton.next_power_of_2(D), "PACKED": packed, "PRECISION": _precision(qkv.dtype)}


def _precision(dtype: torch.dtype) -> str:
    """The interpreter keeps bfloat16 as bits and would multiply those: "wide" multiplies the same values in float32."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "wide"
    return "ieee" if dtype == torch.float32 else "tf32"


def _keys(N: int, step: int) -> dict:
    """One pass over N rounded up to 16, or a loop where that is asked for or N is too long."""
    one = not step and N <= ONE_PASS
    return {"KEYS": triton.cdiv(N, 16) * 16 if one else 0, "LOOP": 0 if one else step or 64}


def launch(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float, config: dict | None = None) -> Tensor:
    """`vitprune.ops.short_attention`; config: as `default` gives."""
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    (B, T, N, H), constants = _arguments(qkv, num_heads, cu_seqlens, max_seqlen)
    if B * N == 0 or T == 0:
        return out.zero_()
    arch, shape = configs.capability(qkv.device), (("B", B), ("N", N), ("D", constants["D"]))
    config = config or configs.nearest(OP, arch, qkv.dtype, shape) or default(qkv.dtype, arch, **dict(shape))
    span = config["queries"] * config["spans"]
    with torch.cuda.device(qkv.device) if qkv.is_cuda else contextlib.nullcontext():
        forward_kernel[B * H * triton.cdiv(N, span),](
            qkv, out, None if cu_seqlens is None else cu_seqlens.contiguous(), B, T, N, H, scale * LOG2E,
            *(qkv.stride() if cu_seqlens is None else (0, *qkv.stride())),
            QUERIES=config["queries"], SPAN=span, **_keys(N, config["keys"]), **constants,
            num_warps=config["num_warps"], num_stages=config["num_stages"])
    return out
