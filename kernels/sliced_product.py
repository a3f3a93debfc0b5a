"""The matrix product that sliced_linear and sliced_mlp are made of: tiles of live blocks, read from and written to full matrices."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native.sliced_product import units
from . import ceil_div
from .policy_attention import dot

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NEVER = 1 << 40


@triton.jit
def share_above(a):
    """P(Z > a) of a standard normal Z for a in [0, 6], to a relative 7e-6, a thirtieth of what rounding to float16 costs: 2^p(a), where
    log2 of it is so smooth that p needs degree 7 (minimax); erf takes more than twice the instructions."""
    p = -1.83481252e-06 * a + 6.15983159e-05
    p = p * a - 0.000930525027
    p = p * a + 0.00850789165
    p = p * a - 0.0539600707
    p = p * a - 0.458464392
    p = p * a - 1.15125105
    return tl.exp2(p * a - 0.999995294)


@triton.jit
def gelu(x, WIDE: tl.constexpr):
    """The exact GELU, x P(Z <= x); WIDE: to float32's last places."""
    if WIDE:
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    a = tl.minimum(tl.abs(x), 6.0)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * share_above(a)


@triton.jit
def gelu_slope(x, WIDE: tl.constexpr):
    """The derivative of `gelu`."""
    if WIDE:
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        above = share_above(tl.minimum(tl.abs(x), 6.0))
        below = tl.where(x < 0, above, 1.0 - above)
    return below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def block_of(live, start, K, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Where the tile of DEPTH live units from `start` on lies among all; it crosses no block of WIDTH. 0 past all K of them."""
    at = tl.load(live + start // WIDTH, mask=start < K, other=0) * WIDTH + start % WIDTH
    return tl.multiple_of(at, DEPTH)


@triton.jit
def units_of(live, start, N, LIVE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """TILE units from `start` on: their numbers among all, or as they are where those are not LIVE; N of them are."""
    at = start + tl.arange(0, TILE)
    if LIVE:
        at = tl.load(live + at // WIDTH, mask=at < N, other=0).to(tl.int64) * WIDTH + at % WIDTH
        RUN: tl.constexpr = min(WIDTH & -WIDTH, TILE)
        at = tl.multiple_of(tl.max_contiguous(at, RUN), RUN)
    return at


@triton.jit
def tile_of(M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column): GROUP tiles below each other run together, and share their columns in the cache."""
    down, across, pid = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), tl.program_id(0)
    first = pid // (GROUP * across) * GROUP
    inside = pid % (GROUP * across)
    size = tl.minimum(down - first, GROUP)
    return (first + inside % size).to(tl.int64) * ROWS, (inside // size).to(tl.int64) * COLUMNS


@triton.jit(do_not_specialize=["M", "K"])
def product_kernel(
    a, b, c, bias, other, live, M, N, K,
    a_row, a_depth, b_depth, b_column, c_part, c_row, c_column, other_row, other_column,
    LIVE_ROWS: tl.constexpr, LIVE_COLUMNS: tl.constexpr, FULL_COLUMNS: tl.constexpr, LIVE_DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    EPILOGUE: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):
    """c = epilogue(a b + bias); grid (tiles of c, parts of the depth: each part writes a c of its own).

    Live units are numbered 0..L*WIDTH in what is compact, by `live` in what is full: c's rows (LIVE_ROWS), b's columns
    (LIVE_COLUMNS) or c's (FULL_COLUMNS), b's depth (LIVE_DEPTH).
    """
    first_row, first_column = tile_of(M, N, ROWS, COLUMNS, GROUP)
    row, column, depth = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    read = units_of(live, first_column, N, LIVE_COLUMNS, WIDTH, COLUMNS)
    a_tile = a + row[:, None] * a_row + depth.to(tl.int64)[None, :] * a_depth
    b_tile = b + depth.to(tl.int64)[:, None] * b_depth + read[None, :] * b_column
    span = tl.cdiv(tl.cdiv(K, DEPTH), tl.num_programs(1)) * DEPTH
    start = tl.program_id(1).to(tl.int64) * span
    block = block_of(live, start, K, WIDTH, DEPTH) if LIVE_DEPTH else start
    inside = tl.full((ROWS, COLUMNS), True, tl.int1)
    if not EVEN_ROWS:
        inside &= (row < M)[:, None]
    if not EVEN_COLUMNS:
        inside &= (column < N)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if other is not None:
        second = other + row[:, None] * other_row + column[None, :] * other_column
        if EPILOGUE != "gelu gradient":
            total += tl.load(second, mask=inside, other=0.0).to(tl.float32)  # now: after the product it would need registers of its own
    if bias is not None:
        total += tl.load(bias + read, mask=column < N, other=0.0).to(tl.float32)[None, :]
    lost = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(start, tl.minimum(start + span, K), DEPTH):
        a_inside, b_inside = tl.full((ROWS, DEPTH), True, tl.int1), tl.full((DEPTH, COLUMNS), True, tl.int1)
        if not EVEN_ROWS:
            a_inside &= (row < M)[:, None]
        if not EVEN_COLUMNS:
            b_inside &= (column < N)[None, :]
        if not EVEN_DEPTH:
            a_inside &= (depth < K - k)[None, :]
            b_inside &= (depth < K - k)[:, None]
        left = tl.load(a_tile + k * a_depth, mask=a_inside, other=0.0)
        right = tl.load(b_tile + block.to(tl.int64) * b_depth, mask=b_inside, other=0.0)
        # read a step ahead: as part of this step it would be a stage of the pipeline, with barriers of its own
        block = block_of(live, k + DEPTH, K, WIDTH, DEPTH) if LIVE_DEPTH else block + DEPTH
        if left.dtype == tl.float32:  # compensated (Kahan, 1965): as exact as a library that splits a depth of thousands
            term = dot(left, right, -lost)
            higher = total + term
            lost = tl.where(tl.abs(higher) < float("inf"), (higher - total) - term, 0.0)
            total = higher
        else:
            total = dot(left, right, total)
    WIDE: tl.constexpr = a.dtype.element_ty == tl.float32
    if EPILOGUE == "gelu gradient":
        before = tl.load(second, mask=inside, other=0.0).to(tl.float32)
        total *= gelu_slope(before, WIDE)
        tl.store(second, gelu(before, WIDE).to(other.dtype.element_ty), mask=inside)
    if EPILOGUE == "gelu":
        total = gelu(total, WIDE)
    down = units_of(live, first_row, M, LIVE_ROWS, WIDTH, ROWS)
    across = units_of(live, first_column, N, FULL_COLUMNS, WIDTH, COLUMNS)
    at = c + tl.program_id(1).to(tl.int64) * c_part + down[:, None] * c_row + across[None, :] * c_column
    tl.store(at, total.to(c.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P", "M"])
def sum_parts_kernel(
    parts, c, live, P, M, N, c_row, c_column,
    LIVE_ROWS: tl.constexpr, FULL_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """grid (tiles of c): the sum of parts [P, M, N], always in the same order."""
    first_row, first_column = tile_of(M, N, ROWS, COLUMNS, 1)
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < N)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in range(P):
        total += tl.load(parts + (part * M.to(tl.int64) + row)[:, None] * N + column[None, :], mask=inside, other=0.0)
    down = units_of(live, first_row, M, LIVE_ROWS, WIDTH, ROWS)
    across = units_of(live, first_column, N, FULL_COLUMNS, WIDTH, COLUMNS)
    tl.store(c + down[:, None] * c_row + across[None, :] * c_column, total.to(c.dtype.element_ty), mask=inside)


def default(dtype: torch.dtype, arch: int, **shape: int) -> dict:
    """Tiles [rows, depth] x [depth, columns], and those of the gradient of weights, whose depth, split into parts so that
    about `programs` run, is that of the tokens; from `large_rows` of those on sliced_product_large serves."""
    names = ("rows", "columns", "depth", "num_warps", "num_stages")
    if dtype == torch.float32 or arch < 80:
        tile = weight = (32, 32, 16, 4, 2)
    else:
        M, wide = shape.get("M", 0), arch in (90, 100)  # their instructions take 64 rows and read both factors from shared memory, which
        rows = 128 if M >= 4096 else 64 if M > 512 or wide else 32  # limits them to three fifths of their rate at 64 columns
        tile = (rows, 128, 64, 4 if arch == 90 else 8, 3) if wide and rows == 128 else (rows, 64, 64, 8 if arch == 100 else 4, 3)
        weight = (64, 64, 64, 4 if wide else 8, 3)  # the others spill with 4
    large = 4096 if arch == 90 and dtype != torch.float32 else NEVER
    return dict(zip(names, tile)) | {f"weight_{name}": value for name, value in zip(names, weight)} | {"programs": 256, "large_rows": large}


def candidates(dtype: torch.dtype, arch: int, **shape: int) -> list[dict]:
    """What is worth timing, the default first."""
    first, keys = default(dtype, arch, **shape), ("rows", "columns", "depth", "num_warps", "num_stages")
    if dtype == torch.float32 or arch < 80:
        tiles = ((32, 64, 32, 4, 2), (64, 32, 32, 4, 2), (64, 64, 16, 8, 2))
    elif arch in (90, 100):
        tiles = ((64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3),
                 (256, 128, 64, 8, 3))
    else:
        tiles = ((32, 64, 64, 4, 4), (64, 64, 64, 4, 3), (128, 64, 32, 4, 4), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4),
                 (128, 128, 32, 8, 4))
    found = [first | dict(zip(keys, tile)) | {"large_rows": NEVER} for tile in tiles]
    found += [first | {"large_rows": 256}] if arch == 90 and dtype != torch.float32 else []
    found += [first | {"programs": 128}, first | {"programs": 512}, *(first | {"weight_num_warps": warps} for warps in (4, 8))]
    return [first, *(c for i, c in enumerate(found) if c != first and c not in found[:i])]


def refuses(device: torch.device, dtype: torch.dtype, *, width: int = 64, **_) -> str | None:
    """Why the product cannot serve, or None."""
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    return None if width % 16 == 0 else f"no kernel for blocks of width {width}: a multiple of 16 is needed"


def product(a: Tensor, b: Tensor, c: Tensor, live: Tensor | None, width: int, *, config: dict, live_rows: bool = False,
            live_columns: bool = False, full_columns: bool = False, live_depth: bool = False, bias: Tensor | None = None,
            other: Tensor | None = None, epilogue: str = "") -> Tensor:
    """c = epilogue(a b + bias) (+ other), where c, b or both hold all units and `live` names the blocks that take part (None: all).

    a [M, K]; b [K, N], all units along its depth (live_depth) or columns (live_columns); c [M, N], all units along its rows
    (live_rows) or columns (full_columns); bias as b's columns; other [M, N] is added, or for the epilogue "gelu gradient" the input of the
    GELU, which its output replaces. Strides are free. Returns c; what is dead in it is left alone.
    """
    M, K = a.shape
    N = units(b.shape[1], live if live_columns else None, width)
    if M == 0 or N == 0:
        return c
    gradient = live_rows or full_columns
    rows, columns, depth, warps, stages = (config[("weight_" if gradient else "") + k]
                                           for k in ("rows", "columns", "depth", "num_warps", "num_stages"))
    while columns > 64 and 8 * (ceil_div(N, columns) * columns - N) > N:  # more than an eighth of the columns past the last
        columns //= 2
    if epilogue == "gelu gradient":  # it holds two tiles
        columns = min(columns, 64)
        warps = 8 if rows * columns > 4096 else warps
    some = live is not None
    depth = min(depth, width & -width) if live_depth and some else depth  # the largest step that crosses no block
    tiles, out = ceil_div(M, rows) * ceil_div(N, columns), c
    parts = max(1, min(config["programs"] // tiles, ceil_div(K, 4 * depth))) if gradient else 1
    flags = {"LIVE_ROWS": live_rows and some, "FULL_COLUMNS": full_columns and some, "WIDTH": width}
    if parts > 1:
        out, direct = torch.empty(parts, M, N, dtype=torch.float32, device=c.device), {"LIVE_ROWS": False, "FULL_COLUMNS": False}
    else:
        out, direct = c[None], {}
    product_kernel[(tiles, parts)](
        a, b, out, bias, other, live, M, N, K, *a.stride(), *b.stride(), *out.stride(), *((0, 0) if other is None else other.stride()),
        **(flags | direct), LIVE_COLUMNS=live_columns and some, LIVE_DEPTH=live_depth and some, EPILOGUE=epilogue,
        EVEN_ROWS=gradient and M % rows == 0, EVEN_COLUMNS=N % columns == 0, EVEN_DEPTH=not gradient and K % depth == 0,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, GROUP=8, num_warps=warps, num_stages=stages)
    if parts > 1:
        sum_parts_kernel[(ceil_div(M, 32) * ceil_div(N, 32),)](out, c, live, parts, M, N, *c.stride(), **flags,
                                                                    ROWS=32, COLUMNS=32, num_warps=4)
    return c
