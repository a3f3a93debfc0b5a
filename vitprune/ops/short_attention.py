"""Attention over short sequences, read from the fused qkv buffer: a dense batch, or packed rows with cu_seqlens."""
import functools
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..native import short_attention as native
from .checks import check_float, check_tensors, fail, is_finite, is_int, values
from .registry import Backend, call, choose, define, exporting, find, gradient, interpreted, large, run, serve
from .triton import kernel, triton

OP = "short_attention"
SMALL = 120_000  # scores: measured on a CPU


def short_attention(qkv: Tensor, *, num_heads: int, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
                    scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v, written straight as rows of H*D channels.

    Dense: qkv [B, N, 3*H*D] -> [B, N, H*D]. Packed: qkv [T, 3*H*D] with cu_seqlens int32 [B+1] -> [T, H*D]; sequence b is
    rows cu_seqlens[b]:cu_seqlens[b+1], from row 0 on, at most max_seqlen of them (needed there: it is never read back from the
    device); rows past cu_seqlens[-1] give zero. scale: D^-0.5 by default.
    Raises ValueError for arguments that do not fit together; what cu_seqlens holds is seen on a CPU only, since nothing waits for a GPU.
    """
    check_tensors(OP, ("cu_seqlens",), qkv=qkv, cu_seqlens=cu_seqlens)
    packed, shape, dtype, device = cu_seqlens is not None, qkv.shape, qkv.dtype, qkv.device
    len(shape) == (2 if packed else 3) or fail(OP, "qkv", "[T, 3*H*D]" if packed else "[B, N, 3*H*D]", shape)
    check_float(OP, qkv=qkv)
    (is_int(num_heads) and num_heads > 0 and shape[-1] % (3 * num_heads) == 0) or fail(OP, "num_heads",
        f"a positive int that divides {shape[-1]} / 3", repr(num_heads))
    ((is_int(max_seqlen) and max_seqlen >= 0) if packed else max_seqlen is None) or fail(OP, "max_seqlen",
        "an int >= 0 with cu_seqlens" if packed else "None without cu_seqlens", repr(max_seqlen))
    if packed:
        (cu_seqlens.dim() == 1 and cu_seqlens.dtype == torch.int32 and cu_seqlens.shape[0] > 0) or fail(OP, "cu_seqlens",
            "int32 [B+1]", f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        if (ends := values(cu_seqlens)) is not None:
            native.lengths(ends, shape[0], max_seqlen)
    scale is None or is_finite(scale) or fail(OP, "scale", "a finite number (it has no gradient)", repr(scale))
    *rows, D = shape
    D //= 3 * num_heads
    if D == 0:
        return qkv.clone()
    fits = True if D % 16 == 0 and 16 <= D <= 128 else False  # a branch, not the size: a graph with dynamic sizes has none to choose by
    facts = {"fits": fits, "packed": packed, "large": large(prod(rows))}
    if device.type == "cpu":
        facts["small"] = not packed and _small(*rows, num_heads)
    name = choose(OP, device, dtype, **facts)
    return call(OP, name, qkv, num_heads, cu_seqlens, max_seqlen or 0, D ** -0.5 if scale is None else scale)


def _small(B: int, N: int, num_heads: int) -> bool:
    """Whether there are so few scores that calling PyTorch several times costs more than what its bfloat16 products save."""
    if exporting():
        return False
    return True if B * num_heads * N * N <= SMALL else False


def reference(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float) -> Tensor:
    """The definition, in plain PyTorch, O(N^2) memory."""
    padded, keep = _pad(qkv, cu_seqlens, max_seqlen)
    q, k, v = _heads(padded, 3, num_heads)
    return _unpad((_weights(q, k, keep, scale) @ v).transpose(1, 2).flatten(2), cu_seqlens, qkv.shape[0])


def library(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float) -> Tensor:
    """PyTorch's fastest attention; packed rows one sequence at a time on a CPU, padded under a mask elsewhere."""
    if cu_seqlens is not None and (ends := values(cu_seqlens)) is not None:
        lengths = [b - a for a, b in zip(ends, ends[1:])]
        parts = [library(s[None], num_heads, None, 0, scale)[0] for s in qkv[:ends[-1]].split(lengths)]
        tail = (parts[0] if parts else qkv).new_zeros(qkv.shape[0] - ends[-1], qkv.shape[1] // 3)  # in autocast's dtype
        return torch.cat([*parts, tail])
    if _matmuls_win(qkv, cu_seqlens):
        return _matmuls(qkv, num_heads, scale)
    padded, keep = _pad(qkv, cu_seqlens, max_seqlen)
    q, k, v = _heads(padded, 3, num_heads)
    mask = None if keep is None else keep[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return _unpad(out.transpose(1, 2).flatten(2), cu_seqlens, qkv.shape[0])


def _matmuls_win(qkv: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether two matrix products and a softmax beat SDPA: measured on a CPU, for short sequences; with a gradient in bfloat16 only."""
    if qkv.device.type != "cpu" or cu_seqlens is not None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if qkv.dtype == torch.bfloat16:
        return 48 <= qkv.shape[1] <= 320 and _native_bfloat16()
    learns = torch.is_grad_enabled() and qkv.requires_grad  # SDPA keeps no N x N for the backward
    return qkv.dtype == torch.float32 and 48 <= qkv.shape[1] <= 144 and not learns


@functools.cache
def _native_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _matmuls(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    B, N, X = qkv.shape
    q, k, v = qkv.view(B, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4).reshape(3, B * num_heads, N, -1)
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)  # beta 0: the first is not read
    out = torch.bmm(scores.softmax(-1), v)
    return out.view(B, num_heads, N, -1).transpose(1, 2).reshape(B, N, X // 3)


def _pad(rows: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[Tensor, Tensor | None]:
    """Packed rows [T, X] -> [B, N, X] and the keys to attend, bool [B, N]; a dense batch passes through."""
    if cu_seqlens is None:
        return rows, None
    offset = torch.arange(max_seqlen, device=rows.device)
    keep = offset < (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]
    index = torch.where(keep, cu_seqlens[:-1, None] + offset, 0)
    source = F.pad(rows, (0, 0, 0, 1)) if rows.shape[0] == 0 else rows
    padded = source.index_select(0, index.flatten()).view(*index.shape, rows.shape[1])
    return torch.where(keep[..., None], padded, 0), keep | (offset == 0)  # no row of the softmax may be empty


def _unpad(padded: Tensor, cu_seqlens: Tensor | None, T: int) -> Tensor:
    """[B, N, X] -> packed rows [T, X], zero past the last sequence; a dense batch passes through."""
    if cu_seqlens is None:
        return padded
    B, N, X = padded.shape
    row = torch.arange(T, device=padded.device, dtype=cu_seqlens.dtype)
    sequence = (torch.searchsorted(cu_seqlens, row, right=True) - 1).clamp(max=B)
    live = row < cu_seqlens[-1]
    index = torch.where(live, sequence * N + row - cu_seqlens[sequence], 0)
    return torch.where(live[:, None], F.pad(padded.reshape(B * N, X), (0, 0, 0, 1)).index_select(0, index), 0)


def _heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:  # [B, N, parts*H*D] -> parts x [B, H, N, D]
    B, N, X = x.shape
    return x.reshape(B, N, parts, num_heads, X // (parts * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)


def _weights(q: Tensor, k: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)


def _backward(dout, qkv, num_heads: int, cu_seqlens, max_seqlen: int, scale: float, backend: str) -> Tensor:
    """The weights are recomputed rather than stored."""
    if backend == "triton":
        return kernel("short_attention_backward").launch(dout, qkv, num_heads, cu_seqlens, max_seqlen, scale)
    padded, keep = _pad(qkv, cu_seqlens, max_seqlen)
    q, k, v = _heads(padded, 3, num_heads)
    do, = _heads(_pad(dout, cu_seqlens, max_seqlen)[0], 1, num_heads)
    a = _weights(q, k, keep, scale)
    da = do @ v.transpose(-2, -1)
    ds = a * (da - (a * da).sum(-1, keepdim=True)) * scale
    grads = torch.stack((ds @ k, ds.transpose(-2, -1) @ q, a.transpose(-2, -1) @ do), 1)  # [B, 3, H, N, D]
    return _unpad(grads.permute(0, 3, 1, 2, 4).flatten(2), cu_seqlens, qkv.shape[0])


def _setup(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(qkv, cu_seqlens)


def _gradient(ctx, dout):
    qkv, cu_seqlens = ctx.saved_tensors
    dqkv = run(OP + "_backward", dout, qkv, ctx.num_heads, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.backend)
    return dqkv, None, None, None, None, None


def _macs(qkv, num_heads, cu_seqlens, max_seqlen, *_) -> int:
    """Dense: exact. Packed: as if every sequence were max_seqlen long, since the lengths are on the device."""
    B, N = qkv[:2] if cu_seqlens is None else (cu_seqlens[0] - 1, max_seqlen)
    return 2 * B * N * N * qkv[-1] // 3


define(OP, "(Tensor qkv, int num_heads, Tensor? cu_seqlens, int max_seqlen, float scale, str backend) -> Tensor",
       lambda qkv, num_heads, cu_seqlens, max_seqlen, scale, backend: find(OP, backend).run(
           qkv, num_heads, cu_seqlens, max_seqlen, scale),
       lambda qkv, *_: qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3), cast=("qkv",), macs=_macs)
define(OP + "_backward", "(Tensor dout, Tensor qkv, int num_heads, Tensor? cu_seqlens, int max_seqlen, float scale, "
       "str backend) -> Tensor", _backward, lambda dout, qkv, *_: torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
       macs=lambda dout, *args: 5 * _macs(*args) // 2)
gradient(OP, _gradient, _setup)


# On an H200 the library is nearly the fastest for a dense batch in eager mode, and for packed rows, which it must pad, the slowest.
serve(OP, Backend("cpp", native.cpp, refuses=native.refuses_cpp, yields=native.yields_cpp),
      Backend("library", library, composite=True, yields=lambda device, dtype, packed=False, **_: packed and device.type == "cuda"),
      Backend("cuda", native.cuda, refuses=native.refuses_cuda, yields=lambda device, dtype, packed=False, **_: not packed),
      triton(OP, yields=lambda device, dtype, packed=False, **_: interpreted(device) or not packed),
      Backend("reference", reference, composite=True))
