"""`vitprune.ops.compact_tokens` and `expand_rows` in CUDA C++."""
import torch
from torch import Tensor

from .. import native
from . import _native

OP, INVERSE = "compact_tokens", "expand_rows"
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuses(device: torch.device, dtype: torch.dtype, **_) -> str | None:
    """Why no launch can serve, or None; dtype: of the rows, whose bits are copied as they are."""
    return native.reason_cuda(device, OP) or (None if dtype.itemsize in SIGNED else f"no kernel for {dtype}")


def cuda(x: Tensor, keep: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Every row up to the capacity is written by one launch; more kept than it holds is reported later, as by the reference."""
    B, N, C = x.shape
    if B * N == 0:
        return x.new_zeros(capacity, C), torch.zeros(B + 1, dtype=torch.int32, device=x.device)
    rows, cu_seqlens = x.new_empty(capacity, C), torch.empty(B + 1, dtype=torch.int32, device=x.device)
    tokens = max(B * N, capacity)
    # Four blocks for each multiprocessor; 16 flags of the mask are read at a time.
    chunk = max(16, -(-tokens // (4 * native.processors(x.device.index) * 16)) * 16)
    _launch(OP, x, rows, keep, cu_seqlens, x.stride(), capacity, 0, chunk, -(-tokens // chunk))
    if capacity < B * N:  # elsewhere there is room for everything
        torch._assert_async(cu_seqlens[-1] <= capacity, f"compact_tokens: more tokens kept than capacity {capacity}")
    return rows, cu_seqlens


def expand_cuda(rows: Tensor, cu_seqlens: Tensor, keep: Tensor, fill: float) -> Tensor:
    """One launch; rows that cu_seqlens and the mask ask for and that are not there read as zero."""
    B, N = keep.shape
    out = rows.new_empty(B, N, rows.shape[1])
    if out.numel():
        parts = min(-(-N // 16), max(1, 4 * native.processors(rows.device.index) // B))
        chunk = -(-N // (16 * parts)) * 16
        bits = torch.tensor(fill, dtype=rows.dtype, device="cpu").view(SIGNED[rows.element_size()]).item()
        _launch(INVERSE, rows, out, keep, cu_seqlens.to(torch.int32), (0, *rows.stride()), rows.shape[0], bits, chunk, B * -(-N // chunk))
    return out


def _launch(name: str, source: Tensor, to: Tensor, keep: Tensor, cu_seqlens: Tensor, strides, rows: int, fill: int, chunk: int,
            blocks: int) -> None:
    (B, N), C, size = keep.shape, source.shape[-1], source.element_size()
    keep = keep.contiguous()
    fill &= (1 << 8 * size) - 1
    repeated = sum(fill << 8 * size * i for i in range(8 // size))
    batch, row, unit = (s * size for s in strides)
    width = size
    if unit == size:  # rows are contiguous: copy the widest unit that every row's start and length allow
        bits = source.data_ptr() | to.data_ptr() | batch | row | C * size | 16
        width = unit = bits & -bits
    params = _native.CompactTokensParams((source.data_ptr(), to.data_ptr(), keep.data_ptr(), cu_seqlens.data_ptr()),
                                         (batch, row, unit, cu_seqlens.stride(0)), C * size // width, rows, repeated, width, B, N, chunk)
    native.launch(OP, name, (blocks if C or name == OP else 0, 1), 256, params, source.device)
