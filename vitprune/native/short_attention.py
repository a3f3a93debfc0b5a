"""`vitprune.ops.short_attention` in C++ and CUDA C++."""
from math import prod

import torch
from torch import Tensor

from .. import native
from . import KINDS, _native

LEAST = 1e-37  # of a scale on a GPU, in place of 0, by which a masked score of -inf would become NaN


def refuses_cpp(device: torch.device, dtype: torch.dtype, *, grad: bool = False, **_) -> str | None:
    """Why `cpp` cannot serve, or None. dtype: of qkv."""
    if reason := native.reason_cpp(device):
        return reason
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {dtype}"
    return "forward only" if grad else None


def yields_cpp(device: torch.device, dtype: torch.dtype, *, packed: bool = False, small: bool = False, **_) -> bool:
    """Whether PyTorch's own products were measured to be faster, over a dense batch: in float32 on Intel's processors with AVX-512 (up to
    1.3 times), at larger sizes in bfloat16 instructions on AMD's, not on Intel's (0.6 times); with AMX nobody has measured."""
    if packed or device.type != "cpu":
        return False
    from ..ops.dispatch import cpu
    intel = cpu("vendor_id") == "GenuineIntel"
    if dtype == torch.float32:
        return intel and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return not small and torch.cpu._is_avx512_bf16_supported() and (not intel or torch.cpu._is_amx_tile_supported())


def lengths(ends: list[int], rows: int, max_seqlen: int) -> list[int]:
    """Rows of each sequence. Raises ValueError for ends that are no rows of qkv."""
    counts = [b - a for a, b in zip(ends, ends[1:])]
    if ends[0] != 0 or ends[-1] > rows or min(counts, default=0) < 0 or max(counts, default=0) > max_seqlen:
        raise ValueError(f"short_attention: cu_seqlens must ascend from 0 to at most {rows} by at most max_seqlen={max_seqlen}, "
                         f"got {str(ends):.100}")
    return counts


def turned_over(qkv: Tensor) -> Tensor:
    """With queries of the opposite sign, for scales below 0: on a GPU the largest score is taken before they are scaled."""
    third = qkv.shape[-1] // 3
    return torch.cat([-qkv[..., :third], qkv[..., third:]], -1)


def _output(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None) -> tuple[Tensor, int, int]:
    """An empty output, its rows, and the width of a head."""
    ends = cu_seqlens is None or (cu_seqlens.dtype == torch.int32 and cu_seqlens.device == qkv.device)
    native.require("short_attention", ends and qkv.shape[-1] % (3 * num_heads) == 0, qkv, cu_seqlens)
    *rows, width = qkv.shape
    return qkv.new_empty((*rows, width // 3)), prod(rows), width // (3 * num_heads)


def cpp(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float) -> Tensor:
    """On the CPU, with as many threads as torch uses. Raises ValueError as `lengths` does."""
    native.require("short_attention", refuses_cpp(qkv.device, qkv.dtype) is None, qkv)
    out, rows, D = _output(qkv, num_heads, cu_seqlens)
    if cu_seqlens is None:
        B, N = qkv.shape[:2]
    else:
        counts = lengths(cu_seqlens.tolist(), rows, max_seqlen)  # again: a compiled graph knows them only here
        B, N, cu_seqlens = len(counts), max(counts, default=0), cu_seqlens.contiguous()
    flat = qkv.reshape(rows, qkv.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    params = _native.ShortAttentionParams(flat.data_ptr(), out.data_ptr(), 0 if cu_seqlens is None else cu_seqlens.data_ptr(),
                                          (B, num_heads, N, D, rows), flat.stride(0), scale, qkv.dtype == torch.bfloat16)
    _native.short_attention_cpu(params, torch.get_num_threads())
    return out


def refuses_cuda(device: torch.device, dtype: torch.dtype, *, grad: bool = False, fits: bool = True, **_) -> str | None:
    """Why `cuda` cannot serve, or None. dtype: of qkv; fits: whether a head's width is a multiple of 16 up to 128."""
    if reason := native.reason_cuda(device, "short_attention"):
        return reason
    if dtype not in KINDS:
        return f"no kernel for {dtype}"
    if grad:
        return "forward only"
    return None if fits else "a head's width is not a multiple of 16 in 16..128"


def cuda(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float) -> Tensor:
    """In one launch; cu_seqlens is not read back, and bounded by the kernel to the rows of qkv."""
    if scale < 0:
        return cuda(turned_over(qkv), num_heads, cu_seqlens, max_seqlen, -scale)
    out, rows, D = _output(qkv, num_heads, cu_seqlens)
    native.require("short_attention", qkv.dtype in KINDS and D % 16 == 0 and D <= 128, qkv)
    B, N = qkv.shape[:2] if cu_seqlens is None else (cu_seqlens.shape[0] - 1, max_seqlen)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        if B * N == 0:
            return out.zero_()
    flat = qkv.reshape(rows, qkv.shape[-1])
    if flat.stride(1) != 1 or flat.data_ptr() % 16 or flat.stride(0) * flat.element_size() % 16:  # rows are read 16 bytes at a time
        flat = flat.clone(memory_format=torch.contiguous_format)
    width = next(w for w in (32, 64, 128) if D <= w)
    warps = 2 if width * qkv.element_size() > 256 else 4  # as in csrc/cuda/short_attention.cu
    params = _native.ShortAttentionParams(flat.data_ptr(), out.data_ptr(), 0 if cu_seqlens is None else cu_seqlens.data_ptr(),
                                          (B, num_heads, N, D, rows), flat.stride(0), max(scale, LEAST), qkv.dtype == torch.bfloat16)
    native.launch("short_attention", f"short_attention_{KINDS[qkv.dtype]}_{width}", (B * num_heads * -(-N // (16 * warps)), 1),
                  32 * warps, params, qkv.device)
    return out
