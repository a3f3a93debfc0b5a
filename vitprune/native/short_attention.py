"""`vitprune.ops.short_attention` in C++."""
import torch
from torch import Tensor

from .. import native
from . import _native


def refuses_cpp(device: torch.device, dtype: torch.dtype, *, grad: bool = False, packed: bool = False, small: bool = False,
                            **_) -> str | None:
    """Why `cpp` cannot serve, or None. dtype: of qkv."""
    if reason := native.reason_cpp(device):
        return reason
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {dtype}"
    if grad:
        return "forward only"
    if dtype == torch.bfloat16 and not (packed or small) and torch.cpu._is_avx512_bf16_supported():
        return "PyTorch's products in bfloat16 instructions are faster at this size"
    return None


def cpp(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float) -> Tensor:
    """On the CPU, with as many threads as torch uses. Raises ValueError for cu_seqlens that are no rows of qkv."""
    out = torch.empty(*qkv.shape[:-1], qkv.shape[-1] // 3, dtype=qkv.dtype)
    rows, D = out.numel() // max(out.shape[-1], 1), out.shape[-1] // num_heads
    if cu_seqlens is None:
        B, N = qkv.shape[:2]
    else:
        lengths = cu_seqlens.diff()
        B, N = lengths.shape[0], int(lengths.max()) if lengths.numel() else 0
        if lengths.lt(0).any() or not 0 <= int(cu_seqlens[0]) <= int(cu_seqlens[-1]) <= rows or N > max_seqlen:
            raise ValueError(f"short_attention: cu_seqlens must ascend within 0..{rows} by at most max_seqlen={max_seqlen}, "
                             f"got {cu_seqlens.tolist()}")
        cu_seqlens = cu_seqlens.contiguous()
    if qkv.stride(-1) != 1 or (cu_seqlens is None and qkv.stride(0) != N * qkv.stride(1)):
        qkv = qkv.contiguous()
    params = _native.ShortAttentionParams(qkv.data_ptr(), out.data_ptr(), 0 if cu_seqlens is None else cu_seqlens.data_ptr(),
                                          (B, num_heads, N, D, rows), qkv.stride(-2), scale, qkv.dtype == torch.bfloat16)
    _native.short_attention_cpu(params, torch.get_num_threads())
    return out
