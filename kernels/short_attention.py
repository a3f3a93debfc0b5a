"""Attention over short sequences, read from the fused qkv buffer: a dense batch, or packed rows with cu_seqlens."""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native import processors
from ..native import short_attention as native
from . import ceil_div, configs, power_of_2
from .policy_attention import INTERPRETED, in_float, on

OP = "short_attention"
ONE_PASS = 256  # the most keys whose scores a program holds at once
WIDTHS = range(16, 129, 16)
LOG2E = tl.constexpr(math.log2(math.e))
LEAST = tl.constexpr(native.LEAST)


@triton.jit
def place(pid, cu_seqlens, T, N, H, SPAN: tl.constexpr, PACKED: tl.constexpr):
    """What program `pid` does: image, head, first row in its sequence; and that sequence's first row and length, within T rows and N:
    nobody has looked at what a GPU is given."""
    parts = tl.cdiv(N, SPAN)
    b = pid // (parts * H)
    if PACKED:
        base = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), T).to(tl.int64)
        n = tl.minimum(tl.minimum(tl.load(cu_seqlens + b + 1), T) - base, N).to(tl.int32)
    else:
        base = b.to(tl.int64) * N
        n = N
    return b.to(tl.int64), ((pid // parts) % H).to(tl.int64), (pid % parts) * SPAN, base, n


@triton.jit
def begin(x, b, head, base, batch, row_stride, channel_stride, D: tl.constexpr, PACKED: tl.constexpr):
    """Where the rows of that head and sequence begin."""
    x += head * D * channel_stride
    if PACKED:
        x += base * row_stride
    else:
        x += b * batch
    return x


@triton.jit
def dot(a, b, acc, x, WIDE: tl.constexpr):
    """acc + a b, with a and b rounded to the dtype of the buffer x."""
    a, b = a.to(x.dtype.element_ty), b.to(x.dtype.element_ty)
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load(x, row, n, row_stride, channel_stride, D: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows of one head [rows, WIDTH]; zero past D channels and, where they are not known to be WHOLE, past n rows."""
    channel = tl.arange(0, WIDTH)
    at = x + row.to(tl.int64)[:, None] * row_stride + channel.to(tl.int64)[None, :] * channel_stride
    if not WHOLE:
        return tl.load(at, mask=(row < n)[:, None] & (channel < D)[None, :], other=0.0)
    return tl.load(at) if D == WIDTH else tl.load(at, mask=(channel < D)[None, :], other=0.0)


@triton.jit
def load_turned(x, row, n, row_stride, channel_stride, D: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr = False):
    """[WIDTH, rows]: `load`, transposed; a tile that is transposed later goes to shared memory again in every step of a loop."""
    channel = tl.arange(0, WIDTH)
    at = x + channel.to(tl.int64)[:, None] * channel_stride + row.to(tl.int64)[None, :] * row_stride
    if not WHOLE:
        return tl.load(at, mask=(channel < D)[:, None] & (row < n)[None, :], other=0.0)
    return tl.load(at) if D == WIDTH else tl.load(at, mask=(channel < D)[:, None], other=0.0)


@triton.jit
def store(x, value, row, n, row_stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load`, channels side by side."""
    channel = tl.arange(0, WIDTH)
    at = x + row.to(tl.int64)[:, None] * row_stride + channel[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(row < n)[:, None] & (channel < D)[None, :])


@triton.jit
def tiles(x, n, row_stride, channel_stride, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
          TURNED: tl.constexpr):
    """KEYS rows as a tuple of tiles, one for each bit of KEYS: 208 is 128 + 64 + 16; n ends in the last one, but where rows are packed."""
    found = ()
    for i in tl.static_range(5):
        if KEYS & (256 >> i):
            row = KEYS // (512 >> i) * (512 >> i) + tl.arange(0, 256 >> i)
            if TURNED:
                tile = load_turned(x, row, n, row_stride, channel_stride, D, WIDTH, not PACKED and KEYS % (256 >> i) > 0)
            else:
                tile = load(x, row, n, row_stride, channel_stride, D, WIDTH, not PACKED and KEYS % (256 >> i) > 0)
            found = found + (tile,)
    return found


@triton.jit
def scores_of(q, k, start, n, x, SIZE: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """q k, with k [WIDTH, SIZE]; -inf past n keys. Not yet scaled: that is one operation with the subtraction of the maximum."""
    s = dot(q, k, tl.zeros((q.shape[0], SIZE), tl.float32), x, WIDE)
    return s if WHOLE else tl.where((start + tl.arange(0, SIZE) < n)[None, :], s, float("-inf"))


@triton.jit
def all_scores(q, ks, n, x, KEYS: tl.constexpr, QUERIES: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr):
    """Scores against every key, a tuple like `tiles`, and their largest."""
    scores = ()
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    for i in tl.static_range(5):
        if KEYS & (256 >> i):
            s = scores_of(q, ks[len(scores)], KEYS // (512 >> i) * (512 >> i), n, x, 256 >> i, WIDE,
                          not PACKED and KEYS % (256 >> i) > 0)
            peak = tl.maximum(peak, tl.max(s, 1))
            scores = scores + (s,)
    return scores, peak


@triton.jit
def shift_of(peak, scale):
    """What to subtract from scaled scores of which `peak` is the largest so far."""
    return tl.where(peak == float("-inf"), 0.0, peak) * scale  # they may all be -inf


@triton.jit
def online(s, peak, scale):
    """A step of the softmax with rescaling: exponentials of this tile, the factor for sums so far, the new maximum."""
    higher = tl.maximum(peak, tl.max(s, 1))
    top = tl.where(higher == float("-inf"), 0.0, higher)
    return tl.exp2(s * scale - (top * scale)[:, None]), tl.exp2((peak - top) * scale), higher  # the factor is 1 where nothing is higher


@triton.jit
def zero_tail(out, cu_seqlens, b, B, T, part, parts, row_stride, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows past the last sequence, shared out over all programs of a head."""
    zero = tl.zeros((ROWS, WIDTH), out.dtype.element_ty)
    for start in range(tl.maximum(tl.load(cu_seqlens + B), 0) + (b * parts + part) * ROWS, T, B.to(tl.int64) * parts * ROWS):
        store(out, zero, start + tl.arange(0, ROWS), T, row_stride, D, WIDTH)


@triton.jit
def ask(x, n, row_stride):
    """Fetch the first 128 bytes of n rows, at most those of one pass, into the L2 cache, without waiting for them."""
    row = tl.minimum(tl.arange(0, 256), n - 1).to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [x + row * row_stride], tl.int32, False, 1)


@triton.jit
def pass_of(q, ks, vs, n, x, scale, KEYS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
            WIDE: tl.constexpr):
    """Attention to keys that are all at hand: the sum of values under weights, that of weights, and the largest score."""
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    scores, peak = all_scores(q, ks, n, x, KEYS, QUERIES, PACKED, WIDE)
    shift = shift_of(peak, scale)
    for i in tl.static_range(len(scores)):
        p = tl.exp2(scores[i] * scale - shift[:, None])
        total += tl.sum(p, 1)
        acc = dot(p, vs[i], acc, x, WIDE)
    return acc, total, peak


@triton.jit(do_not_specialize=["B", "T", "N", "H"])
def forward_kernel(
    qkv, out, cu_seqlens,
    B, T, N, H, scale, x_batch, x_row, x_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, LOOP: tl.constexpr, QUERIES: tl.constexpr, SPANS: tl.constexpr,
    UNROLL: tl.constexpr, AHEAD: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):
    """grid (images * heads * parts of SPANS tiles of QUERIES); keys in one pass over KEYS of them, or first the last ones, at most KEYS,
    and then LOOP at a time, all of which are there. The scale is positive or 0. UNROLL: load all queries beside the keys, to wait but
    once, for one pass over rows that are not packed. AHEAD: ask for the rows of so many programs later."""
    SPAN: tl.constexpr = QUERIES * SPANS
    pid = tl.program_id(0)
    b, head, first, base, n = place(pid, cu_seqlens, T, N, H, SPAN, PACKED)
    q_ptr = begin(qkv, b, head, base, x_batch, x_row, x_channel, D, PACKED)
    k_ptr = q_ptr + H.to(tl.int64) * D * x_channel
    v_ptr = k_ptr + H.to(tl.int64) * D * x_channel
    if PACKED:
        zero_tail(out + head * D, cu_seqlens, b, B, T, first // SPAN, tl.cdiv(N, SPAN), H * D, QUERIES, D, WIDTH)
    if first < n:
        scale = tl.maximum(scale, LEAST, propagate_nan=tl.PropagateNan.ALL) * LOG2E
        last = n * 0 if LOOP == 0 else (n - 1) // LOOP * LOOP
        skipped = last.to(tl.int64) * x_row
        qs = ()
        for i in tl.static_range(SPANS if UNROLL else 0):
            qs = qs + (load(q_ptr, first + i * QUERIES + tl.arange(0, QUERIES), n, x_row, x_channel, D, WIDTH),)
        ks = tiles(k_ptr + skipped, n - last, x_row, x_channel, KEYS, D, WIDTH, PACKED, True)
        vs = tiles(v_ptr + skipped, n - last, x_row, x_channel, KEYS, D, WIDTH, PACKED, False)
        if AHEAD:
            pid += AHEAD
            if pid < B * H:
                later, its, _, start, rows = place(pid, cu_seqlens, T, N, H, SPAN, PACKED)
                if rows > 0:
                    for i in tl.static_range(3):
                        ask(begin(qkv, later, its + i * H, start, x_batch, x_row, x_channel, D, PACKED), rows, x_row)
        out += base * H * D + head * D
        if UNROLL:
            for i in tl.static_range(SPANS):
                row = first + i * QUERIES + tl.arange(0, QUERIES)
                acc, total, _ = pass_of(qs[i], ks, vs, n, qkv, scale, KEYS, QUERIES, WIDTH, PACKED, WIDE)
                store(out, acc * (1.0 / total)[:, None], row, n, H * D, D, WIDTH)
        else:
            for start in range(first, tl.minimum(first + SPAN, n), QUERIES):
                row = start + tl.arange(0, QUERIES)
                q = load(q_ptr, row, n, x_row, x_channel, D, WIDTH)
                acc, total, peak = pass_of(q, ks, vs, n - last, qkv, scale, KEYS, QUERIES, WIDTH, PACKED, WIDE)
                if LOOP > 0:
                    for at in range(0, last, LOOP):
                        key = at + tl.arange(0, LOOP)
                        k = load_turned(k_ptr, key, n, x_row, x_channel, D, WIDTH, True)
                        weights, fade, peak = online(scores_of(q, k, at, n, qkv, LOOP, WIDE, True), peak, scale)
                        total = total * fade + tl.sum(weights, 1)
                        v = load(v_ptr, key, n, x_row, x_channel, D, WIDTH, True)
                        acc = dot(weights, v, acc * fade[:, None], qkv, WIDE)
                store(out, acc * (1.0 / total)[:, None], row, n, H * D, D, WIDTH)


def refuses(device: torch.device, dtype: torch.dtype, *, fits: bool = True, **_) -> str | None:
    """Why `launch` cannot serve, or None. fits: whether the heads' width is one of WIDTHS."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {dtype}"
    return None if fits else f"the heads' width is not a multiple of 16 in {WIDTHS[0]}..{WIDTHS[-1]}"


def fits_on_chip(N: int, D: int) -> bool:
    """Whether the keys and values of a head, in 16 bits, leave room in 99 KiB of shared memory."""
    return N <= ONE_PASS and N * power_of_2(D) <= ONE_PASS * 64


def without_matrices(dtype: torch.dtype, arch: int, D: int) -> tuple[int, int] | None:
    """Keys and warps that leave registers free beside 16 queries where Triton multiplies without matrix instructions; None elsewhere."""
    if dtype != torch.float32 and arch >= 80:
        return None
    return (32, 4) if D <= 64 and arch >= 80 else (16, 8)


def default(dtype: torch.dtype, arch: int, *, B: int = 128, H: int = 6, N: int = 197, D: int = 64) -> dict:
    """queries: rows of a tile; spans: tiles a program does one after the other; keys: 0 for one pass, or those of a step."""
    if small := without_matrices(dtype, arch, D):
        return {"queries": 16, "spans": 1, "keys": small[0], "num_warps": small[1], "num_stages": 2}
    one = fits_on_chip(N, D)
    many = one and B * H >= (256 if arch == 90 else 512) and D > 32  # enough to fill a card: read a head's keys once; narrow ones are fast
    rows = 32 if many and arch not in (90, 100) else 64  # what is kept over the queries leaves fewer registers for their scores
    return {"queries": rows, "spans": ceil_div(N, rows) if many else 1, "keys": 0 if one else 64 if D <= 64 else 32,
            "num_warps": 4 if one or D <= 64 else 8, "num_stages": 1 if one and not many else 2}  # one tile: nothing to load ahead


def candidates(dtype: torch.dtype, arch: int, **shape) -> list[dict]:
    """What is worth timing, the default first."""
    first = default(dtype, arch, **shape)
    if without_matrices(dtype, arch, shape.get("D", 64)):
        found = [first | {"queries": q, "keys": k, "num_warps": w}
                 for q, k, w in ((16, 16, 4), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 32, 8))]
    else:
        every = ceil_div(shape.get("N", 197), 32)
        found = [first | {"spans": s} for s in {1, 2, ceil_div(every, 2)}]
        found += [first | {"queries": 32, "spans": s, "num_warps": w} for s, w in ((1, 2), (1, 4), (every, 2), (every, 4))
                  if arch != 90 or s == 1 or w == 4]
        found += [first | {"queries": q, "keys": k, "spans": 1} for q, k in ((64, 32), (64, 64), (128, 64))]
        found += [first | {"queries": 128, "spans": ceil_div(every, 4), "num_warps": 8}] if arch == 90 else []
    return [first, *(c for i, c in enumerate(found) if c != first and c not in found[:i])]


def arguments(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[tuple, dict]:
    """(B, T, N, H) and the constants that every kernel takes."""
    D = qkv.shape[-1] // (3 * num_heads)
    packed = cu_seqlens is not None
    B, N = (cu_seqlens.shape[0] - 1, max_seqlen) if packed else qkv.shape[:2]
    return (B, qkv.shape[0] if packed else B * N, N, num_heads), {
        "D": D, "WIDTH": power_of_2(D), "PACKED": packed,
        "WIDE": INTERPRETED.value}  # the interpreter keeps bfloat16 as bits and would multiply those


def keys_of(N: int, step: int, even: bool) -> dict:
    """One pass over N rounded up to 16, or a loop where that is asked for or N is too long: even, or with a first step over what is left
    after the others."""
    if not step and N <= ONE_PASS:
        return {"KEYS": ceil_div(N, 16) * 16, "LOOP": 0}
    step = step or 64
    return {"KEYS": step if even else ceil_div((N - 1) % step + 1, 16) * 16, "LOOP": step}


def chosen(op: str, otherwise, qkv: Tensor, B: int, H: int, N: int, D: int) -> dict:
    """The configuration tuned for the nearest shape, or otherwise(dtype, arch, **shape)."""
    arch, shape = configs.capability(qkv.device), {"B": B, "H": H, "N": N, "D": D}
    return configs.nearest(op, arch, qkv.dtype, tuple(shape.items())) or otherwise(qkv.dtype, arch, **shape)


def launch(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float, config: dict | None = None) -> Tensor:
    """`vitprune.ops.short_attention`; config: as `default` gives."""
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    (B, T, N, H), constants = arguments(qkv, num_heads, cu_seqlens, max_seqlen)
    if B * N == 0 or T == 0:
        return out.zero_()
    if in_float(qkv):
        return launch(qkv.float(), num_heads, cu_seqlens, max_seqlen, scale, config).to(qkv.dtype)
    if scale < 0:
        return launch(native.turned_over(qkv), num_heads, cu_seqlens, max_seqlen, -scale, config)
    config = config or chosen(OP, default, qkv, B, H, N, constants["D"])
    queries, keys = config["queries"], keys_of(N, config["keys"], constants["PACKED"])
    spans = min(config["spans"], ceil_div(N, queries))
    parts = ceil_div(N, queries * spans)
    once = keys["LOOP"] == 0 and configs.capability(qkv.device) == 90  # measured on Hopper alone; 4 and 8 ahead gained less than 2
    ahead = 2 * processors(qkv.device.index) if once and parts == 1 and not constants["WIDE"] else 0
    with on(qkv.device):
        forward_kernel[(B * H * parts,)](
            qkv, out, None if cu_seqlens is None else cu_seqlens.contiguous(), B, T, N, H, scale,
            *(qkv.stride() if cu_seqlens is None else (0, *qkv.stride())),
            QUERIES=queries, SPANS=spans, UNROLL=once and cu_seqlens is None, AHEAD=ahead, **keys, **constants,
            num_warps=config["num_warps"], num_stages=config["num_stages"])
    return out
