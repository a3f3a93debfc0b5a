"""The product that `vitprune.ops.sliced_linear` and `sliced_mlp` are made of, in CUDA C++."""
import torch
from torch import Tensor

from .. import native
from . import KINDS, _native

OP = "sliced_product"
EPILOGUES = {"": 0, "gelu": 1, "gelu gradient": 2}


def units(all_: int, live: Tensor | None, width: int) -> int:
    """How many units are live, of that many."""
    return all_ if live is None else len(live) * width


def refuses(device: torch.device, dtype: torch.dtype, *, width: int = 64, **_) -> str | None:
    """Why `product` cannot serve, or None. dtype: of all tensors; width: of a block."""
    if reason := native.reason_cuda(device, OP):
        return reason
    if dtype not in KINDS:
        return f"no kernel for {dtype}"
    return None if width % 16 == 0 else f"no kernel for blocks of width {width}: a multiple of 16 is needed"


def product(a: Tensor, b: Tensor, c: Tensor, live: Tensor | None, width: int, *, live_rows: bool = False, live_columns: bool = False,
            full_columns: bool = False, live_depth: bool = False, bias: Tensor | None = None, other: Tensor | None = None,
            epilogue: str = "") -> Tensor:
    """c = epilogue(a b + bias) (+ other), where c, b or both hold all units and `live` names the blocks that take part (None: all).

    a [M, K]; b [K, N], all units along its depth (live_depth) or columns (live_columns); c [M, N], all units along its rows
    (live_rows) or columns (full_columns); bias as b's columns; other [M, N] is added, or for the epilogue "gelu gradient" the input of the
    GELU, which its output replaces. Strides are free. Returns c; what is dead in it is left alone.
    """
    M, K = a.shape
    N = units(b.shape[1], live if live_columns else None, width)
    if M == 0 or N == 0:
        return c
    a, columns = _aligned(a), b.stride(1) == 1
    b = _aligned(b if columns else b.t())
    major, minor = native.capability(a.device)
    tensor_cores = (major, minor) >= (8, 0) or ((major, minor) == (7, 5) and a.dtype == torch.float16)
    enough = -(-M // 128) * -(-N // 128) >= native.processors(a.device.index)  # large tiles: one for every multiprocessor
    size = 128 if tensor_cores and a.dtype != torch.float32 and enough else 64
    others = (0, 0) if other is None else other.stride()
    params = _native.SlicedProductParams(
        (a.data_ptr(), b.data_ptr(), c.data_ptr(), *(0 if t is None else t.data_ptr() for t in (bias, other, live))),
        (a.stride(0), b.stride(0), *c.stride(), *others), (M, N, K), width, width.bit_length() - 1 if width & width - 1 == 0 else -1,
        tuple(flag and live is not None for flag in (live_rows, live_columns, full_columns, live_depth)), EPILOGUES[epilogue])
    tiles = -(-M // size) * -(-N // size)
    native.launch(OP, f"{OP}_{KINDS[a.dtype]}_{size}_{'columns' if columns else 'depth'}", (tiles, 1), 2 * size, params, a.device)
    return c


def _aligned(t: Tensor) -> Tensor:
    """t [rows, columns], or a copy of which 16 bytes can be read at a time: rows side by side, padded with zeros."""
    unit = 16 // t.element_size()
    if t.stride(1) == 1 and t.shape[1] % unit == 0 and t.stride(0) % unit == 0 and t.data_ptr() % 16 == 0 and t.stride(0) >= 0:
        return t
    rows = t.new_zeros(t.shape[0], -(-t.shape[1] // unit) * unit)
    rows[:, :t.shape[1]] = t
    return rows
