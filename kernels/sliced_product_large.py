"""The products of sliced_linear and sliced_mlp where there are many rows: the live blocks of a factor are copied side by side, 4 to 6 us on
an H200 (a product of 25,216 rows takes 100 for DeiT-B), and then every product with nothing to add to it is the library's, which no kernel
here beats; the others run on tiles that the card itself copies (Hopper's tensor memory accelerator)."""
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..native.sliced_product import units
from . import ceil_div
from . import sliced_product as small
from .policy_attention import dot
from .sliced_product import block_of, gelu, gelu_slope, sum_parts_kernel, tile_of, units_of

ROWS, COLUMNS, DEPTH = 128, 128, 64  # two programs a multiprocessor: one multiplies while the other starts or ends


@triton.jit
def gather_kernel(
    full, out, live, M, N, full_row, full_column, LIVE_ROWS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """grid (tiles of out): out [M, N] is the live rows or columns of full."""
    first_row, first_column = tile_of(M, N, ROWS, COLUMNS, 1)
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < N)[None, :]
    down = units_of(live, first_row, M, LIVE_ROWS, WIDTH, ROWS)
    across = units_of(live, first_column, N, not LIVE_ROWS, WIDTH, COLUMNS)
    found = tl.load(full + down[:, None] * full_row + across[None, :] * full_column, mask=inside, other=0.0)
    tl.store(out + row[:, None] * N + column[None, :], found, mask=inside)


@triton.jit(do_not_specialize=["M", "K"])
def descriptor_kernel(
    a, b, c, bias, other, live, M, N, K,
    TURNED: tl.constexpr, LIVE_BIAS: tl.constexpr, LIVE_DEPTH: tl.constexpr, WIDTH: tl.constexpr, EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):
    """grid (tiles of c): `small.product_kernel` on tensor descriptors, which fill what lies outside with zeros and do not write it. b is
    [N, K] if TURNED. Live units are numbered by `live` in the bias (LIVE_BIAS) or in b's depth (LIVE_DEPTH)."""
    first_row, first_column = tile_of(M, N, ROWS, COLUMNS, GROUP)
    row, column = first_row.to(tl.int32), first_column.to(tl.int32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    block = block_of(live, 0, K, WIDTH, DEPTH) if LIVE_DEPTH else 0
    for k in range(0, K, DEPTH):
        left = a.load([row, k])
        right = b.load([column, block]).T if TURNED else b.load([block, column])
        block = block_of(live, k + DEPTH, K, WIDTH, DEPTH) if LIVE_DEPTH else block + DEPTH  # a step ahead, as in product_kernel
        total = dot(left, right, total)
    if bias is not None:
        read = units_of(live, first_column, N, LIVE_BIAS, WIDTH, COLUMNS)
        total += tl.load(bias + read, mask=column + tl.arange(0, COLUMNS) < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "gelu":
        total = gelu(total, False)
    if other is not None:
        second = other.load([row, column]).to(tl.float32)
        if EPILOGUE == "gelu gradient":
            total *= gelu_slope(second, False)
            other.store([row, column], gelu(second, False).to(other.dtype))
        else:
            total += second
    c.store([row, column], total.to(c.dtype))


@triton.jit(do_not_specialize=["M"])
def column_sums_kernel(t, out, M, N, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """grid (tiles of columns, parts): out [parts, N], the sum of every parts-th tile of rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(tl.program_id(1) * ROWS, M, tl.num_programs(1) * ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)
        at = t + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        total += tl.load(at, mask=(row < M)[:, None] & (column < N)[None, :], other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(1) * N + column, tl.sum(total, 0), mask=column < N)


def gather(full: Tensor, dim: int, live: Tensor, width: int) -> Tensor:
    """The live blocks of full [R, S] along dim, side by side, in the same order of strides."""
    if full.stride(0) == 1 < full.stride(1):
        return gather(full.t(), 1 - dim, live, width).t()
    shape = [*full.shape]
    shape[dim] = len(live) * width
    out = full.new_empty(shape)
    if out.numel():
        M, N = shape
        gather_kernel[(ceil_div(M, 16) * ceil_div(N, 128),)](
            full, out, live, M, N, *full.stride(), LIVE_ROWS=dim == 0, WIDTH=width, ROWS=16, COLUMNS=128, num_warps=4)
    return out


def described(*tensors: Tensor) -> bool:
    """Whether descriptors can be made of them and of what is gathered from them: rows of whole 16 bytes, channels side by side."""
    return all(t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(0) > 0 and t.data_ptr() % 16 == 0
               and t.shape[1] * t.element_size() % 16 == 0 for t in tensors)


def column_sums(t: Tensor) -> Tensor:
    """t [M, N] -> [N], in a fixed order; if large 1.2 to 1.5 times as fast as PyTorch's on an H200, before its loop was pipelined."""
    M, N = t.shape
    if t.dtype == torch.float32 or M * N < 1 << 20 or t.stride(1) != 1:
        return t.sum(0)
    parts = t.new_empty(128, N, dtype=torch.float32)
    column_sums_kernel[(ceil_div(N, 128), len(parts))](t, parts, M, N, t.stride(0), ROWS=32, COLUMNS=128, num_warps=4)
    return parts.sum(0)


def product(a: Tensor, b: Tensor, c: Tensor, live: Tensor | None, width: int, *, config: dict, live_rows: bool = False,
            live_columns: bool = False, full_columns: bool = False, live_depth: bool = False, bias: Tensor | None = None,
            other: Tensor | None = None, epilogue: str = "") -> Tensor:
    """`small.product`, which serves where there are fewer than config["large_rows"] rows, or where nothing is to be gathered an eighth."""
    M, K = a.shape
    N = units(b.shape[1], live if live_columns else None, width)
    gradient = live_rows or full_columns
    enough = (K if gradient else M) * (8 if live is None else 1) >= config["large_rows"]
    # Where the depth is more than twice the width, the library's product and an addition are faster than one that adds.
    fused = epilogue != "" or (other is not None and K <= 2 * N)
    turned = b.stride(0) == 1
    if not enough or a.dtype == torch.float32 or min(M, N, K) == 0 or (
            fused and not described(a, b.t() if turned else b, c, *(() if other is None else (other,)))):
        return small.product(a, b, c, live, width, config=config, live_rows=live_rows, live_columns=live_columns,
                             full_columns=full_columns, live_depth=live_depth, bias=bias, other=other, epilogue=epilogue)
    if gradient:
        return weights_gradient(a, b, c, live, width, live_rows)
    direct = fused and live_depth and width % DEPTH == 0  # no step of the depth crosses a block: b is read as it lies
    if live is not None and not direct:
        b = gather(b, 0 if live_depth else 1, live, width)
    if not fused:
        if bias is not None and live_columns and live is not None:
            bias = gather(bias[None], 1, live, width)[0]
        torch.mm(a, b, out=c) if bias is None else torch.addmm(bias, a, b, out=c)
        return c if other is None else c.add_(other)
    tile = TensorDescriptor.from_tensor
    descriptor_kernel[(ceil_div(M, ROWS) * ceil_div(N, COLUMNS),)](
        tile(a, [ROWS, DEPTH]), tile(b.t(), [COLUMNS, DEPTH]) if turned else tile(b, [DEPTH, COLUMNS]), tile(c, [ROWS, COLUMNS]),
        bias, None if other is None else tile(other, [ROWS, COLUMNS]), live, M, N, K,
        TURNED=turned, LIVE_BIAS=live_columns and live is not None, LIVE_DEPTH=direct and live is not None, WIDTH=width,
        EPILOGUE=epilogue, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, GROUP=8,
        num_warps=8 if epilogue == "gelu gradient" else 4, num_stages=3)  # the gradient holds two tiles
    return c


def weights_gradient(a: Tensor, b: Tensor, c: Tensor, live: Tensor | None, width: int, rows: bool) -> Tensor:
    """c = a b, its live rows or else its live columns, by the library."""
    if live is None:
        return torch.mm(a, b, out=c)
    M, N = a.shape[0], b.shape[1]
    sum_parts_kernel[(ceil_div(M, 32) * ceil_div(N, 32),)](  # of one part: a copy
        a @ b, c, live, 1, M, N, *c.stride(), LIVE_ROWS=rows, FULL_COLUMNS=not rows, WIDTH=width, ROWS=32, COLUMNS=32, num_warps=4)
    return c
