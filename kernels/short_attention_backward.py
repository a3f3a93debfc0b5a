"""The gradient of short_attention from recomputed weights: one kernel for queries, one for keys and values, no atomics."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native import short_attention as native
from . import ceil_div
from .policy_attention import rounded_product
from .short_attention import (
    LEAST,
    LOG2E,
    all_scores,
    arguments,
    begin,
    chosen,
    dot,
    fits_on_chip,
    in_float,
    keys_of,
    load,
    load_turned,
    on,
    online,
    place,
    scores_of,
    shift_of,
    store,
    tiles,
    without_matrices,
    zero_tail,
)

OP = "short_attention_backward"


@triton.jit(do_not_specialize=["B", "T", "N", "H"])
def query_gradient_kernel(
    dout, qkv, dqkv, cu_seqlens, peaks, deltas,
    B, T, N, H, scale, x_batch, x_row, x_channel, d_batch, d_row, d_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, LOOP: tl.constexpr, QUERIES: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr,
):
    """dq, and for every query and head what `key_gradient_kernel` needs: log2 of the softmax's sum, and sum(dout * out).

    grid (images * heads * tiles of QUERIES). Both come from the recomputed weights, so the forward stores nothing. The scale is positive
    or 0.
    """
    b, head, first, base, n = place(tl.program_id(0), cu_seqlens, T, N, H, QUERIES, PACKED)
    q_ptr = begin(qkv, b, head, base, x_batch, x_row, x_channel, D, PACKED)
    k_ptr = q_ptr + H.to(tl.int64) * D * x_channel
    v_ptr = k_ptr + H.to(tl.int64) * D * x_channel
    if PACKED:
        for part in tl.static_range(3):
            zero_tail(dqkv + (part * H + head) * D, cu_seqlens, b, B, T, first // QUERIES, tl.cdiv(N, QUERIES), 3 * H * D,
                      QUERIES, D, WIDTH)
    if first < n:
        row = first + tl.arange(0, QUERIES)
        q = load(q_ptr, row, n, x_row, x_channel, D, WIDTH)
        do = load(begin(dout, b, head, base, d_batch, d_row, d_channel, D, PACKED), row, n, d_row, d_channel, D, WIDTH)
        total = tl.zeros((QUERIES,), tl.float32)
        delta = tl.zeros((QUERIES,), tl.float32)
        dq = tl.zeros((QUERIES, WIDTH), tl.float32)
        unit = tl.maximum(scale, LEAST, propagate_nan=tl.PropagateNan.ALL) * LOG2E
        if LOOP == 0:
            ks = tiles(k_ptr, n, x_row, x_channel, KEYS, D, WIDTH, PACKED, True)
            vs = tiles(v_ptr, n, x_row, x_channel, KEYS, D, WIDTH, PACKED, True)
            scores, peak = all_scores(q, ks, n, qkv, KEYS, QUERIES, PACKED, WIDE)
            shift = shift_of(peak, unit)
            weights = ()
            slopes = ()
            for i in tl.static_range(len(scores)):
                p = tl.exp2(scores[i] * unit - shift[:, None])
                dp = dot(do, vs[i], tl.zeros(p.shape, tl.float32), qkv, WIDE)
                total += tl.sum(p, 1)
                delta += tl.sum(rounded_product(p, dp), 1)
                weights = weights + (p.to(qkv.dtype.element_ty),)
                slopes = slopes + (dp,)
            delta /= total
            for i in tl.static_range(len(weights)):
                dq = dot(weights[i] * (slopes[i] - delta[:, None]), tl.trans(ks[i]), dq, qkv, WIDE)
        else:
            peak = tl.full((QUERIES,), float("-inf"), tl.float32)
            for at in range(0, n, LOOP):
                key = at + tl.arange(0, LOOP)
                k = load_turned(k_ptr, key, n, x_row, x_channel, D, WIDTH)
                v = load_turned(v_ptr, key, n, x_row, x_channel, D, WIDTH)
                dp = dot(do, v, tl.zeros((QUERIES, LOOP), tl.float32), qkv, WIDE)
                p, fade, peak = online(scores_of(q, k, at, n, qkv, LOOP, WIDE, False) * unit, peak, 1.0)
                total = total * fade + tl.sum(p, 1)
                delta = delta * fade + tl.sum(rounded_product(p, dp), 1)
            delta /= total
            shift = shift_of(peak, 1.0)
            for at in range(0, n, LOOP):
                key = at + tl.arange(0, LOOP)
                k = load_turned(k_ptr, key, n, x_row, x_channel, D, WIDTH)
                v = load_turned(v_ptr, key, n, x_row, x_channel, D, WIDTH)
                p = tl.exp2(scores_of(q, k, at, n, qkv, LOOP, WIDE, False) * unit - shift[:, None])
                dp = dot(do, v, tl.zeros((QUERIES, LOOP), tl.float32), qkv, WIDE)
                dq = dot(p * (dp - delta[:, None]), tl.trans(k), dq, qkv, WIDE)
        store(dqkv + base * 3 * H * D + head * D, dq * (scale / total)[:, None], row, n, 3 * H * D, D, WIDTH)
        at = head * T + base + row
        tl.store(peaks + at, shift + tl.log2(total), mask=row < n)
        tl.store(deltas + at, delta, mask=row < n)


@triton.jit(do_not_specialize=["T", "N", "H"])
def key_gradient_kernel(
    dout, qkv, dqkv, cu_seqlens, peaks, deltas,
    T, N, H, scale, x_batch, x_row, x_channel, d_batch, d_row, d_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):
    """dk and dv, a program for each tile of KEYS keys of a head: nothing is added from outside, so no atomics."""
    b, head, first, base, n = place(tl.program_id(0), cu_seqlens, T, N, H, KEYS, PACKED)
    q_ptr = begin(qkv, b, head, base, x_batch, x_row, x_channel, D, PACKED)
    k_ptr = q_ptr + H.to(tl.int64) * D * x_channel
    do_ptr = begin(dout, b, head, base, d_batch, d_row, d_channel, D, PACKED)
    at = head * T + base
    if first < n:
        key = first + tl.arange(0, KEYS)
        k = load(k_ptr, key, n, x_row, x_channel, D, WIDTH)
        v = load(k_ptr + H.to(tl.int64) * D * x_channel, key, n, x_row, x_channel, D, WIDTH)
        dk = tl.zeros((KEYS, WIDTH), tl.float32)
        dv = tl.zeros((KEYS, WIDTH), tl.float32)
        for start in range(0, n, QUERIES):
            row = start + tl.arange(0, QUERIES)
            q = load(q_ptr, row, n, x_row, x_channel, D, WIDTH)
            do = load(do_ptr, row, n, d_row, d_channel, D, WIDTH)
            s = dot(k, tl.trans(q), tl.zeros((KEYS, QUERIES), tl.float32), qkv, WIDE) * (scale * LOG2E)
            p = tl.exp2(s - tl.load(peaks + at + row, mask=row < n, other=0.0)[None, :])
            p = tl.where((row < n)[None, :], p, 0.0)
            dv = dot(p, do, dv, qkv, WIDE)
            dp = dot(v, tl.trans(do), tl.zeros((KEYS, QUERIES), tl.float32), qkv, WIDE)
            ds = p * (dp - tl.load(deltas + at + row, mask=row < n, other=0.0)[None, :])
            dk = dot(ds, q, dk, qkv, WIDE)
        dk_ptr = dqkv + base * 3 * H * D + (H + head) * D
        store(dk_ptr, dk * scale, key, n, 3 * H * D, D, WIDTH)
        store(dk_ptr + H * D, dv, key, n, 3 * H * D, D, WIDTH)


def default(dtype: torch.dtype, arch: int, *, B: int = 128, H: int = 6, N: int = 197, D: int = 64) -> dict:
    """queries, keys, num_warps, num_stages: as in the forward, for dq; with k_ before: tiles and pipeline for dk and dv."""
    if small := without_matrices(dtype, arch, D):
        keys, warps = small
        return {"queries": 16, "keys": keys, "num_warps": warps, "num_stages": 1,
                "k_queries": 16, "k_keys": keys, "k_warps": warps, "k_stages": 1}
    one = fits_on_chip(N, D)
    large, narrow = arch in (90, 100), D <= 32  # the matrix instructions of those take 64 rows and spare registers
    tall = one and large and N <= 208 and D <= 64
    one &= tall or not narrow  # elsewhere every warp would hold all keys of narrow heads
    return {"queries": 32 if one and not tall else 64, "keys": 0 if one else 32,
            "num_warps": 4 if D <= 64 and (tall or not one or N <= 128) else 8, "num_stages": 2,
            "k_queries": 64 if (narrow and arch < 120) or (large and D <= 64) else 32, "k_keys": 64,
            "k_warps": 4 if D <= 64 else 8, "k_stages": 2}


def candidates(dtype: torch.dtype, arch: int, **shape) -> list[dict]:
    """What is worth timing, the default first."""
    first = default(dtype, arch, **shape)
    if without_matrices(dtype, arch, shape.get("D", 64)):
        found = [first | {"queries": q, "k_keys": q, "keys": k, "k_queries": k, "num_warps": w, "k_warps": w}
                 for q, k, w in ((16, 16, 4), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 32, 8))]
    else:
        found = [first | {"keys": k, "num_warps": w} for k, w in ((64, 4), (32, 4))]
        found += [first | {"queries": 32, "num_warps": 4}]
        found += [first | {"k_queries": q, "k_keys": k, "k_warps": w} for q, k, w in ((32, 64, 4), (32, 128, 8), (64, 128, 8), (64, 64, 8))]
    return [first, *(c for i, c in enumerate(found) if c != first and c not in found[:i])]


def launch(dout: Tensor, qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float,
           config: dict | None = None) -> Tensor:
    """The gradient with respect to qkv; config: as `default` gives."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    (B, T, N, H), constants = arguments(qkv, num_heads, cu_seqlens, max_seqlen)
    if B * N == 0 or T == 0:
        return dqkv.zero_()
    if in_float(qkv):
        return launch(dout.float(), qkv.float(), num_heads, cu_seqlens, max_seqlen, scale, config).to(qkv.dtype)
    if scale < 0:
        return native.turned_over(launch(dout, native.turned_over(qkv), num_heads, cu_seqlens, max_seqlen, -scale, config))
    config = config or chosen(OP, default, qkv, B, H, N, constants["D"])
    peaks, deltas = torch.empty(2, H, T, dtype=torch.float32, device=qkv.device)
    packed = cu_seqlens is not None
    strides = (0, *qkv.stride(), 0, *dout.stride()) if packed else (*qkv.stride(), *dout.stride())
    tensors = (dout, qkv, dqkv, cu_seqlens.contiguous() if packed else None, peaks, deltas)
    with on(qkv.device):
        query_gradient_kernel[(B * H * ceil_div(N, config["queries"]),)](
            *tensors, B, T, N, H, scale, *strides, QUERIES=config["queries"], **keys_of(N, config["keys"], True), **constants,
            num_warps=config["num_warps"], num_stages=config["num_stages"])
        key_gradient_kernel[(B * H * ceil_div(N, config["k_keys"]),)](
            *tensors, T, N, H, scale, *strides, QUERIES=config["k_queries"], KEYS=config["k_keys"], **constants,
            num_warps=config["k_warps"], num_stages=config["k_stages"])
    return dqkv
