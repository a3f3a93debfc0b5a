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
LOG2E = tl.constexpr(math.log2(math.e))


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
def _online(s, peak):
    """A step of the softmax with rescaling: exponentials of this tile, the factor for sums so far, the new maximum."""
    higher = tl.maximum(peak, tl.max(s, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # scores may all be -inf so far
    return tl.exp2(s - shift[:, None]), tl.exp2(peak - shift), higher


@triton.jit
def _head(x, b, head, base, batch, row_stride, channel_stride, D: tl.constexpr, PACKED: tl.constexpr):
    """Where the rows of that head and sequence begin."""
    x += head.to(tl.int64) * D * channel_stride
    if PACKED:
        x += base * row_stride
    else:
        x += b * batch
    return x


@triton.jit
def _parts(qkv, b, head, base, H, batch, row_stride, channel_stride, D: tl.constexpr, PACKED: tl.constexpr):
    """Where q, k and v of that head and sequence begin."""
    q = _head(qkv, b, head, base, batch, row_stride, channel_stride, D, PACKED)
    part = head.to(tl.int64) * 0 + H * D
    return q, q + part * channel_stride, q + 2 * part * channel_stride


@triton.jit
def _zero_tail(out, cu_seqlens, b, B, T, part, parts, row_stride, QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows past the last sequence, shared out over all programs of a head."""
    zero = tl.zeros((QUERIES, WIDTH), out.dtype.element_ty)
    stride = (b * 0 + B) * parts * QUERIES  # in 64 bits
    for start in range(tl.load(cu_seqlens + B) + (b * parts + part) * QUERIES, T, stride):
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
    q_ptr, k_ptr, v_ptr = _parts(qkv, b, head, base, H, x_batch, x_row, x_channel, D, PACKED)
    if PACKED:
        _zero_tail(out + head * D, cu_seqlens, b, B, T, first // SPAN, tl.cdiv(N, SPAN), H * D, QUERIES, D, WIDTH)
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
                scores, peak = _all_scores(q, ks, n, scale * LOG2E, qkv, KEYS, QUERIES, PRECISION)
                for i in tl.static_range(len(scores)):
                    p = tl.exp2(scores[i] - peak[:, None])
                    total += tl.sum(p, 1)
                    acc = _dot(p, vs[i], acc, qkv, PRECISION)
            else:
                peak = tl.full((QUERIES,), float("-inf"), tl.float32)
                for at in range(0, n, LOOP):
                    key = at + tl.arange(0, LOOP)
                    s = _scores(q, _load(k_ptr, key, n, x_row, x_channel, D, WIDTH), at, n, scale * LOG2E, qkv, LOOP, PRECISION)
                    p, fade, peak = _online(s, peak)
                    total = total * fade + tl.sum(p, 1)
                    v = _load(v_ptr, key, n, x_row, x_channel, D, WIDTH)
                    acc = _dot(p, v, acc * fade[:, None], qkv, PRECISION)
            _store(out + base * H * D + head * D, acc / total[:, None], row, n, H * D, D, WIDTH)


@triton.jit
def query_gradient_kernel(
    dout, qkv, dqkv, cu_seqlens, peaks, deltas,
    B, T, N, H, scale, x_batch, x_row, x_channel, d_batch, d_row, d_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, LOOP: tl.constexpr, QUERIES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq, and for every query and head what `key_gradient_kernel` needs: log2 of the softmax's sum, and sum(dout * out).

    grid (images * heads * tiles of QUERIES). Both come from the recomputed weights, so the forward stores nothing.
    """
    b, head, first, base, n = _place(cu_seqlens, N, H, QUERIES, PACKED)
    q_ptr, k_ptr, v_ptr = _parts(qkv, b, head, base, H, x_batch, x_row, x_channel, D, PACKED)
    do_ptr = _head(dout, b, head, base, d_batch, d_row, d_channel, D, PACKED)
    if PACKED:
        for part in tl.static_range(3):
            _zero_tail(dqkv + (part * H + head) * D, cu_seqlens, b, B, T, first // QUERIES, tl.cdiv(N, QUERIES), 3 * H * D,
                       QUERIES, D, WIDTH)
    if first < n:
        row = first + tl.arange(0, QUERIES)
        q = _load(q_ptr, row, n, x_row, x_channel, D, WIDTH)
        do = _load(do_ptr, row, n, d_row, d_channel, D, WIDTH)
        total = tl.zeros((QUERIES,), tl.float32)
        delta = tl.zeros((QUERIES,), tl.float32)
        dq = tl.zeros((QUERIES, WIDTH), tl.float32)
        if LOOP == 0:
            ks = _tiles(k_ptr, n, x_row, x_channel, KEYS, D, WIDTH)
            vs = _tiles(v_ptr, n, x_row, x_channel, KEYS, D, WIDTH)
            scores, peak = _all_scores(q, ks, n, scale * LOG2E, qkv, KEYS, QUERIES, PRECISION)
            weights = ()
            slopes = ()
            for i in tl.static_range(len(scores)):
                p = tl.exp2(scores[i] - peak[:, None])
                dp = _dot(do, tl.trans(vs[i]), tl.zeros(p.shape, tl.float32), qkv, PRECISION)
                total += tl.sum(p, 1)
                delta += tl.sum(p * dp, 1)
                weights = weights + (p,)
                slopes = slopes + (dp,)
            delta /= total
            for i in tl.static_range(len(weights)):
                ds = weights[i] / total[:, None] * (slopes[i] - delta[:, None])
                dq = _dot(ds, ks[i], dq, qkv, PRECISION)
        else:
            peak = tl.full((QUERIES,), float("-inf"), tl.float32)
            for at in range(0, n, LOOP):
                key = at + tl.arange(0, LOOP)
                s = _scores(q, _load(k_ptr, key, n, x_row, x_channel, D, WIDTH), at, n, scale * LOG2E, qkv, LOOP, PRECISION)
                v = _load(v_ptr, key, n, x_row, x_channel, D, WIDTH)
                dp = _dot(do, tl.trans(v), tl.zeros((QUERIES, LOOP), tl.float32), qkv, PRECISION)
                p, fade, peak = _online(s, peak)
                total = total * fade + tl.sum(p, 1)
                delta = delta * fade + tl.sum(p * dp, 1)
            delta /= total
            for at in range(0, n, LOOP):
                key = at + tl.arange(0, LOOP)
                k = _load(k_ptr, key, n, x_row, x_channel, D, WIDTH)
                p = tl.exp2(_scores(q, k, at, n, scale * LOG2E, qkv, LOOP, PRECISION) - peak[:, None]) / total[:, None]
                v = _load(v_ptr, key, n, x_row, x_channel, D, WIDTH)
                dp = _dot(do, tl.trans(v), tl.zeros((QUERIES, LOOP), tl.float32), qkv, PRECISION)
                dq = _dot(p * (dp - delta[:, None]), k, dq, qkv, PRECISION)
        _store(dqkv + base * 3 * H * D + head * D, dq * scale, row, n, 3 * H * D, D, WIDTH)
        at = head.to(tl.int64) * T + base + row
        tl.store(peaks + at, peak + tl.log2(total), mask=row < n)
        tl.store(deltas + at, delta, mask=row < n)


@triton.jit
def key_gradient_kernel(
    dout, qkv, dqkv, cu_seqlens, peaks, deltas,
    T, N, H, scale, x_batch, x_row, x_channel, d_batch, d_row, d_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk and dv, a program for each tile of KEYS keys of a head: nothing is added from outside, so no atomics."""
    b, head, first, base, n = _place(cu_seqlens, N, H, KEYS, PACKED)
    q_ptr, k_ptr, v_ptr = _parts(qkv, b, head, base, H, x_batch, x_row, x_channel, D, PACKED)
    do_ptr = _head(dout, b, head, base, d_batch, d_row, d_channel, D, PACKED)
    at = head.to(tl.int64) * T + base
    if first < n:
        key = first + tl.arange(0, KEYS)
        k = _load(k_ptr, key, n, x_row, x_channel, D, WIDTH)
        v = _load(v_ptr, key, n, x_row, x_channel, D, WIDTH)
        dk = tl.zeros((KEYS, WIDTH), tl.float32)
        dv = tl.zeros((KEYS, WIDTH), tl.float32)
        for start in range(0, n, QUERIES):
            row = start + tl.arange(0, QUERIES)
            q = _load(q_ptr, row, n, x_row, x_channel, D, WIDTH)
            do = _load(do_ptr, row, n, d_row, d_channel, D, WIDTH)
            s = _dot(k, tl.trans(q), tl.zeros((KEYS, QUERIES), tl.float32), qkv, PRECISION) * (scale * LOG2E)
            p = tl.exp2(s - tl.load(peaks + at + row, mask=row < n, other=0.0)[None, :])
            p = tl.where((row < n)[None, :], p, 0.0)
            dv = _dot(p, do, dv, qkv, PRECISION)
            dp = _dot(v, tl.trans(do), tl.zeros((KEYS, QUERIES), tl.float32), qkv, PRECISION)
            ds = p * (dp - tl.load(deltas + at + row, mask=row < n, other=0.0)[None, :])
            dk = _dot(ds, q, dk, qkv, PRECISION)
        dk_ptr = dqkv + base * 3 * H * D + (H + head) * D
        _store(dk_ptr, dk * scale, key, n, 3 * H * D, D, WIDTH)
        _store(dk_ptr + H * D, dv, key, n, 3 * H * D, D, WIDTH)


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


def default_backward(dtype: torch.dtype, arch: int, **shape) -> dict:
    """queries, keys, num_warps, num_stages: as in `default`, for dq; with k_ before: tiles and pipeline for dk and dv."""
    if dtype == torch.float32 or arch < 80:
        return {"queries": 16, "keys": 16, "num_warps": 4, "num_stages": 1,
                "k_queries": 16, "k_keys": 16, "k_warps": 4, "k_stages": 1}
    one = shape.get("N", 197) <= ONE_PASS
    return {"queries": 64, "keys": 0 if one else 64, "num_warps": 8, "num_stages": 2,
            "k_queries": 64, "k_keys": 64, "k_warps": 4, "k_stages": 2}


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
            qkv, out, None if cu_seqlens is None else cu_seqlens.contiguous(), B, T, N, H, scale,
            *(qkv.stride() if cu_seqlens is None else (0, *qkv.stride())),
            QUERIES=config["queries"], SPAN=span, **_keys(N, config["keys"]), **constants,
            num_warps=config["num_warps"], num_stages=config["num_stages"])
    return out


def launch_backward(dout: Tensor, qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float,
                    config: dict | None = None) -> Tensor:
    """The gradient of `launch` with respect to qkv; config: as `default_backward` gives."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    (B, T, N, H), constants = _arguments(qkv, num_heads, cu_seqlens, max_seqlen)
    if B * N == 0 or T == 0:
        return dqkv.zero_()
    arch, shape = configs.capability(qkv.device), (("B", B), ("N", N), ("D", constants["D"]))
    config = config or configs.nearest(OP + "_backward", arch, qkv.dtype, shape) or default_backward(qkv.dtype, arch, **dict(shape))
    peaks, deltas = torch.empty(2, H, T, dtype=torch.float32, device=qkv.device)
    packed = cu_seqlens is not None
    strides = (0, *qkv.stride(), 0, *dout.stride()) if packed else (*qkv.stride(), *dout.stride())
    tensors = (dout, qkv, dqkv, cu_seqlens.contiguous() if packed else None, peaks, deltas)
    with torch.cuda.device(qkv.device) if qkv.is_cuda else contextlib.nullcontext():
        query_gradient_kernel[B * H * triton.cdiv(N, config["queries"]),](
            *tensors, B, T, N, H, scale, *strides, QUERIES=config["queries"], **_keys(N, config["keys"]), **constants,
            num_warps=config["num_warps"], num_stages=config["num_stages"])
        key_gradient_kernel[B * H * triton.cdiv(N, config["k_keys"]),](
            *tensors, T, N, H, scale, *strides, QUERIES=config["k_queries"], KEYS=config["k_keys"], **constants,
            num_warps=config["k_warps"], num_stages=config["k_stages"])
    return dqkv
