"""The compiled backends: the C++ extension `_native`, and CUDA kernels from shipped cubins or NVRTC."""
import functools
from pathlib import Path

import torch
from torch import Tensor

from . import nvrtc

try:
    from . import _native
except ImportError as error:  # installed without a C++ compiler, or on a system the extension is not built for
    _native, _missing = None, f"the C++ extension is not installed ({error}): reinstall where a C++ compiler is found"
else:
    _missing = None

SCORE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # ScoreType in csrc/params.h
LIMIT = 2 ** 31 - 1


def reason_cpp(device: torch.device) -> str | None:
    """Why the C++ backends cannot serve that device, or None."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    return _missing


def reason_cuda(device: torch.device, op: str) -> str | None:
    """Why the CUDA C++ backend of operator `op` cannot serve that device, or None."""
    if device.type != "cuda":
        return f"runs on an NVIDIA GPU, not on {device.type}"
    if torch.version.hip:
        return "runs on an NVIDIA GPU; this torch is built for ROCm"
    if _missing:
        return _missing
    if cubin_path(op, torch.cuda.get_device_capability(device)) is None and nvrtc.library() is None:
        return f"{nvrtc.MISSING}, and no cubin was built for this card when installed"
    return None


def driver_version() -> int:
    """The newest CUDA that the installed driver supports, 13020 for 13.2; 0 where that is not known."""
    return _native.driver_version() if _native else 0


def cubins() -> dict[str, list[str]]:
    """Architectures of the cubins that came with the install, by operator."""
    found: dict[str, list[str]] = {}
    for path in sorted(_cubin_folder().glob("*.cubin")) if _native else ():
        op, arch, _ = path.name.rsplit(".", 2)
        found.setdefault(op, []).append(arch)
    return found


def cubin_path(op: str, capability: tuple[int, int]) -> Path | None:
    """The shipped cubin that a card of that compute capability runs: same major, the highest minor up to its own."""
    major, minor = capability
    candidates = (_cubin_folder() / f"{op}.sm{major}{m}.cubin" for m in range(minor, -1, -1)) if _native else ()
    return next((path for path in candidates if path.is_file()), None)


def _cubin_folder() -> Path:  # beside the extension: an editable install keeps both away from the sources
    return Path(_native.__file__).parent / "cubins"


@functools.cache
def kernel(op: str, index: int):
    """The kernel `op`, loaded on CUDA device `index`. Raises RuntimeError naming the operator and what failed."""
    capability = torch.cuda.get_device_capability(index)
    path = cubin_path(op, capability)
    image = path.read_bytes() if path else nvrtc.compiled(op, capability)
    return _native.load_kernel(image, op, index)


def refuses_cpp(device: torch.device, dtype: torch.dtype, *, scores: torch.dtype = torch.float32, **_) -> str | None:
    """Why `select_tokens_cpp` cannot serve, or None. dtype: of x, any; scores: the dtype of the scores."""
    return reason_cpp(device) or _refuses_scores(scores)


def refuses_cuda(device: torch.device, dtype: torch.dtype, *, scores: torch.dtype = torch.float32, **_) -> str | None:
    """Why `select_tokens_cuda` cannot serve, or None. dtype: of x, any; scores: the dtype of the scores."""
    return reason_cuda(device, "select_tokens") or _refuses_scores(scores)


def _refuses_scores(dtype: torch.dtype) -> str | None:
    return None if dtype in SCORE_TYPES else f"no kernel for scores of {dtype}"


def select_tokens_cpp(x: Tensor, scores: Tensor, k: int, prefix: int) -> tuple[Tensor, Tensor]:
    """`vitprune.ops.select_tokens` in C++, with as many threads as torch uses."""
    tokens, ids, params = _select_tokens(x, scores, k, prefix)
    if params is not None:
        _native.select_tokens_cpu(params, torch.get_num_threads())
    return tokens, ids


def select_tokens_cuda(x: Tensor, scores: Tensor, k: int, prefix: int) -> tuple[Tensor, Tensor]:
    """`vitprune.ops.select_tokens` in CUDA C++: one launch on the current stream of x's device."""
    tokens, ids, params = _select_tokens(x, scores, k, prefix)
    if params is not None:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _native.select_tokens_cuda(kernel("select_tokens", x.device.index), stream, params, _processors(x.device.index))
    return tokens, ids


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _select_tokens(x: Tensor, scores: Tensor, k: int, prefix: int):
    """Outputs and kernel parameters; None for parameters where there is nothing to write."""
    B, N, C = x.shape
    tokens = torch.empty(B, prefix + k, C, dtype=x.dtype, device=x.device)
    ids = torch.empty(B, k, dtype=torch.int64, device=x.device)
    if B == 0 or prefix + k == 0:
        return tokens, ids, None
    if max(B, N) > LIMIT:
        raise ValueError(f"select_tokens: B and P+N must be at most {LIMIT}, got {B} and {N}")
    size = x.element_size()
    batch, token, channel = (s * size for s in x.stride())
    unit = size
    if channel == size:  # rows are contiguous: copy the widest unit that every row's start and length allow
        bits = x.data_ptr() | tokens.data_ptr() | batch | token | C * size | 16
        unit = channel = bits & -bits
    strides = (batch, token, channel, *(s * scores.element_size() for s in scores.stride()))
    params = _native.SelectTokensParams(x.data_ptr(), scores.data_ptr(), tokens.data_ptr(), ids.data_ptr(),
                                        (B, prefix, N - prefix, k), strides, C * size // unit, unit,
                                        SCORE_TYPES[scores.dtype])
    return tokens, ids, params


def refuses_policy_attention(device: torch.device, dtype: torch.dtype, **_) -> str | None:
    """Why `policy_attention_cpp` cannot serve, or None. dtype: of q, k and v."""
    return reason_cpp(device) or (None if dtype in (torch.float32, torch.bfloat16) else f"no kernel for {dtype}")


def policy_attention_cpp(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`vitprune.ops.policy_attention` in C++: output [B, H, N, D], a transposed [B, N, H, D]; row maxima and sums [B, H, N], float32."""
    B, H, N, D = q.shape
    out = torch.empty(B, N, H, D, dtype=q.dtype).transpose(1, 2)
    m, z = torch.empty(B, H, N), torch.empty(B, H, N)
    _policy_attention(scale, eps, (q, k, v, policy, out, m, z))
    return out, m, z


def policy_attention_backward_cpp(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, policy: Tensor, out: Tensor, m: Tensor, z: Tensor,
                                  scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and policy; m is held constant, which changes them by the order of eps."""
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    dpolicy = torch.empty(q.shape[:3])
    _policy_attention(scale, eps, (q, k, v, policy, out, m, z), dout, dq, dk, dv, dpolicy)
    return dq, dk, dv, dpolicy.sum(1).to(policy.dtype)


def _policy_attention(scale: float, eps: float, forward: tuple[Tensor, ...], dout: Tensor | None = None, *gradients: Tensor) -> None:
    q, k, v, policy, out, m, z = forward
    policy = policy.float().contiguous()
    strided = (q, k, v, out, out if dout is None else dout)
    addresses = [0 if t is None else t.data_ptr() for t in (q, k, v, policy, out, m, z, dout, *(gradients or (None,) * 4))]
    params = _native.PolicyAttentionParams(tuple(addresses), tuple(q.shape), tuple(s for t in strided for s in t.stride()), scale, eps,
                                           q.dtype == torch.bfloat16)
    _native.policy_attention_cpu(params, torch.get_num_threads())


def refuses_short_attention(device: torch.device, dtype: torch.dtype, *, grad: bool = False, packed: bool = False, small: bool = False,
                            **_) -> str | None:
    """Why `short_attention_cpp` cannot serve, or None. dtype: of qkv."""
    if reason := reason_cpp(device):
        return reason
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {dtype}"
    if grad:
        return "forward only"
    if dtype == torch.bfloat16 and not (packed or small) and torch.cpu._is_avx512_bf16_supported():
        return "PyTorch's products in bfloat16 instructions are faster at this size"
    return None


def short_attention_cpp(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, scale: float) -> Tensor:
    """`vitprune.ops.short_attention` in C++. Raises ValueError for cu_seqlens that are no rows of qkv."""
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
