"""The token predictor in three products: what each patch and its image say, with the norm before it; both together; the score."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ceil_div, configs, power_of_2
from .add_norm import DTYPES, as_rows
from .policy_attention import dot, on, rounded_product
from .sliced_product import gelu

OP = "score_tokens"


@triton.jit
def place(N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(image, tile of its N patches, columns among C) of this program; those of one tile run together."""
    tiles, across, pid = tl.cdiv(N, ROWS), tl.cdiv(C, COLUMNS), tl.program_id(0)
    return (pid // across // tiles).to(tl.int64), pid // across % tiles, pid % across * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def weights_tile(w, row, at, rows, inner, stride, DEPTH: tl.constexpr):
    """A tile [DEPTH, row] of w^T, from its column `at` on; zero past `rows` rows and `inner` columns."""
    column = at + tl.arange(0, DEPTH)
    return tl.load(w + row[None, :] * stride + column[:, None], mask=(row < rows)[None, :] & (column < inner)[:, None], other=0.0)


@triton.jit
def bias_of(b, at, n):
    """Entries of a bias, zero past n; None is zero."""
    return tl.zeros(at.shape, tl.float32) if b is None else tl.load(b + at, mask=at < n, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def features_kernel(x, norm_w, norm_b, w, b, mask, local, sums, N, x_batch, x_row, eps,
                    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """gelu(norm(x) w^T + b), grid (B x tiles of N x tiles of C): its first half is kept, local [B, N, C/2]; of the second the sum over
    the tile's patches, those of the mask, sums [B, tiles of N, C/2]."""
    HALF: tl.constexpr = C // 2
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float32
    image, tile, column = place(N, C, ROWS, COLUMNS)
    row, depth = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    inside = row < N
    rows = x + image * x_batch + row.to(tl.int64)[:, None] * x_row
    total = tl.zeros((ROWS,), tl.float32)
    first = tl.load(x + image * x_batch + row.to(tl.int64) * x_row, mask=inside, other=0.0).to(tl.float32)  # of equal values the exact mean
    for k in range(0, C, DEPTH):
        value = tl.load(rows + (k + depth)[None, :], mask=inside[:, None] & (k + depth < C)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tl.where((k + depth < C)[None, :], value - first[:, None], 0.0), 1)
    mean = first + total / C
    total = tl.zeros((ROWS,), tl.float32)
    for k in range(0, C, DEPTH):
        value = tl.load(rows + (k + depth)[None, :], mask=inside[:, None] & (k + depth < C)[None, :], other=0.0).to(tl.float32)
        value = tl.where((k + depth < C)[None, :], value - mean[:, None], 0.0)
        total += tl.sum(rounded_product(value, value), 1)
    scale = 1.0 / tl.sqrt(total / C + eps)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, C, DEPTH):
        lane = k + depth < C
        value = tl.load(rows + (k + depth)[None, :], mask=inside[:, None] & lane[None, :], other=0.0).to(tl.float32)
        value = (value - mean[:, None]) * scale[:, None] * tl.load(norm_w + k + depth, mask=lane, other=0.0).to(tl.float32)[None, :]
        value += bias_of(norm_b, k + depth, C)[None, :]
        acc = dot(value.to(x.dtype.element_ty), weights_tile(w, column, k, C, C, C, DEPTH), acc)
    acc = gelu(acc + bias_of(b, column, C)[None, :], WIDE)
    tl.store(local + (image * N + row)[:, None] * HALF + column[None, :], acc.to(local.dtype.element_ty),
             mask=inside[:, None] & (column < HALF)[None, :])
    if mask is not None:
        inside &= tl.load(mask + image * N + row, mask=inside, other=0) != 0
    shared = tl.sum(tl.where(inside[:, None], acc, 0.0), 0)
    tl.store(sums + (image * tl.cdiv(N, ROWS) + tile) * HALF + column - HALF, shared, mask=(column >= HALF) & (column < C))


@triton.jit(do_not_specialize=["N"])
def mixture_kernel(local, sums, mask, w, b, hidden, N, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                   PARTS: tl.constexpr):
    """gelu(local w_1^T + mean w_2^T + b) for w = [w_1 | w_2], grid (B x tiles of N x tiles of C/2): hidden [B, N, C/2]."""
    HALF: tl.constexpr = C // 2
    WIDE: tl.constexpr = local.dtype.element_ty == tl.float32
    image, tile, column = place(N, HALF, ROWS, COLUMNS)
    row, depth = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    P = tl.cdiv(N, ROWS)
    part, patch = tl.arange(0, PARTS), tl.arange(0, 256)
    count = N
    if mask is not None:
        count = 0
        for start in range(0, N, 256):
            count += tl.sum((tl.load(mask + image * N + start + patch, mask=start + patch < N, other=0) != 0).to(tl.int32), 0)
        count = tl.maximum(count, 1)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    shared = bias_of(b, column, HALF)
    for k in range(0, HALF, DEPTH):
        lane = k + depth < HALF
        at = local + (image * N + row)[:, None] * HALF + (k + depth)[None, :]
        value = tl.load(at, mask=(row < N)[:, None] & lane[None, :], other=0.0)
        acc = dot(value, weights_tile(w, column, k, HALF, HALF, C, DEPTH), acc)
        mean = tl.sum(tl.load(sums + (image * P + part)[:, None] * HALF + (k + depth)[None, :], mask=(part < P)[:, None] & lane[None, :],
                              other=0.0), 0) / count.to(tl.float32)
        of_all = weights_tile(w + HALF, column, k, HALF, HALF, C, DEPTH).to(tl.float32)
        shared += tl.sum(rounded_product(of_all, mean[:, None]), 0)
    acc = gelu(acc + shared[None, :], WIDE)
    tl.store(hidden + (image * N + row)[:, None] * HALF + column[None, :], acc.to(hidden.dtype.element_ty),
             mask=(row < N)[:, None] & (column < HALF)[None, :])


@triton.jit(do_not_specialize=["M"])
def scores_kernel(hidden, w, b, last_w, last_b, scores, M, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """The difference of the two logits of gelu(hidden w^T + b), grid (tiles of M = B N patches)."""
    HALF: tl.constexpr = C // 2
    QUARTER: tl.constexpr = C // 4
    WIDE: tl.constexpr = hidden.dtype.element_ty == tl.float32
    row, depth = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    score = tl.zeros((ROWS,), tl.float32)
    for start in range(0, QUARTER, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, HALF, DEPTH):
            inside = (row < M)[:, None] & (k + depth < HALF)[None, :]
            value = tl.load(hidden + row[:, None] * HALF + (k + depth)[None, :], mask=inside, other=0.0)
            acc = dot(value, weights_tile(w, column, k, QUARTER, HALF, HALF, DEPTH), acc)
        acc = gelu(acc + bias_of(b, column, QUARTER)[None, :], WIDE)
        keep = tl.load(last_w + column, mask=column < QUARTER, other=0.0).to(tl.float32)
        drop = tl.load(last_w + QUARTER + column, mask=column < QUARTER, other=0.0).to(tl.float32)
        score += tl.sum(acc * (keep - drop)[None, :], 1)
    if last_b is not None:
        score += tl.load(last_b).to(tl.float32) - tl.load(last_b + 1).to(tl.float32)
    tl.store(scores + row, score.to(scores.dtype.element_ty), mask=row < M)


def default(dtype: torch.dtype, arch: int, *, B: int = 1, N: int = 196, C: int = 384) -> dict:
    """Tiles of patches and of columns, and the depth of each step; score_rows: patches of a tile of the last product, whose columns are
    worked on `columns` at a time."""
    if dtype == torch.float32 or arch < 80:
        return {"rows": 32, "columns": 32, "depth": 16, "score_rows": 32, "num_warps": 4, "num_stages": 3}
    many = B * ceil_div(N, 64) * ceil_div(C, 64) >= 512  # enough to fill a card with larger tiles
    rows, columns = (64, 64) if many else (32, 32)
    return {"rows": rows, "columns": columns, "depth": 64, "score_rows": 64 if many else 16, "num_warps": 4,
            "num_stages": 2 if arch == 100 and not many else 3}  # there three spill


def candidates(dtype: torch.dtype, arch: int, **shape: int) -> list[dict]:
    """What is worth timing, the default first."""
    first = default(dtype, arch, **shape)
    if dtype == torch.float32 or arch < 80:
        return [first, first | {"rows": 64}, first | {"depth": 32}]
    found = [first | dict(zip(("rows", "columns", "depth", "num_warps", "num_stages"), tile)) for tile in (
        (32, 32, 64, 4, 3), (32, 64, 64, 4, 3), (64, 32, 64, 4, 3), (64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (32, 32, 128, 4, 2),
        (64, 64, 32, 4, 4), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3))]
    found += [first | {"score_rows": rows} for rows in (16, 32, 64, 128)]
    return [first, *(c for i, c in enumerate(found) if c != first and c not in found[:i])]


def refuses(device: torch.device, dtype: torch.dtype, *, grad: bool = False, **_) -> str | None:
    """Why `launch` cannot serve, or None. dtype: of patches and weights."""
    if grad:
        return "forward only"
    return None if dtype in DTYPES else f"no kernel for {dtype}"


def launch(patches: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, w1: Tensor, b1: Tensor | None, w2: Tensor,
           b2: Tensor | None, w3: Tensor, b3: Tensor | None, w4: Tensor, b4: Tensor | None, mask: Tensor | None,
           config: dict | None = None) -> Tensor:
    """`vitprune.ops.score_tokens` for the layers of a predictor in their order."""
    B, N, C = patches.shape
    scores = torch.empty(B, N, dtype=patches.dtype, device=patches.device)
    if scores.numel() == 0:
        return scores
    arch, shape = configs.capability(patches.device), {"B": B, "N": N, "C": C}
    config = config or configs.nearest(OP, arch, patches.dtype, tuple(shape.items())) or default(patches.dtype, arch, **shape)
    local, hidden = torch.empty(2, B, N, C // 2, dtype=patches.dtype, device=patches.device)
    tiles = ceil_div(N, config["rows"])
    sums = torch.empty(B, tiles, C // 2, dtype=torch.float32, device=patches.device)
    patches, mask = as_rows(patches), None if mask is None else mask.contiguous().view(torch.uint8)
    norm_weight, norm_bias, w1, b1, w2, b2, w3, b3, w4, b4 = (
        t if t is None else t.contiguous() for t in (norm_weight, norm_bias, w1, b1, w2, b2, w3, b3, w4, b4))
    constants = {"C": C, "ROWS": config["rows"], "COLUMNS": config["columns"], "DEPTH": config["depth"],
                 "num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    with on(patches.device):
        features_kernel[(B * tiles * ceil_div(C, config["columns"]),)](
            patches, norm_weight, norm_bias, w1, b1, mask, local, sums, N, *patches.stride()[:2], eps, **constants)
        mixture_kernel[(B * tiles * ceil_div(C // 2, config["columns"]),)](
            local, sums, mask, w2, b2, hidden, N, PARTS=power_of_2(tiles), **constants)
        scores_kernel[(ceil_div(B * N, config["score_rows"]),)](
            hidden, w3, b3, w4, b4, scores, B * N, **constants | {"ROWS": config["score_rows"]})
    return scores
