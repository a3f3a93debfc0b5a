"""`vitprune.ops.policy_attention` in C++ and CUDA C++."""
import torch
from torch import Tensor

from .. import native
from . import KINDS, _native

OP = "policy_attention"


def gradients_like(q: Tensor) -> Tensor:
    """Room for the gradients of q, k and v [B, H, N, D], side by side as where they come from: [B, N, 3, H, D]."""
    B, H, N, D = q.shape
    return torch.empty(B, N, 3, H, D, dtype=q.dtype, device=q.device)


def outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the output, for the row maxima and for the sums."""
    B, H, N, D = q.shape
    out = torch.empty_strided((B, H, N, D), (N * H * D, D, H * D, 1), dtype=q.dtype, device=q.device)
    return out, *(torch.empty(B, H, N, dtype=torch.float32, device=q.device) for _ in range(2))


def refuses_cpp(device: torch.device, dtype: torch.dtype, **_) -> str | None:
    """Why `cpp` cannot serve, or None. dtype: of q, k and v."""
    return native.reason_cpp(device) or (None if dtype in (torch.float32, torch.bfloat16) else f"no kernel for {dtype}")


def cpp(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], laid out as [B, N, H, D]; row maxima and sums [B, H, N], float32."""
    out, m, z = outputs(q)
    _run(scale, eps, (q, k, v, policy, out, m, z))
    return out, m, z


def backward_cpp(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, policy: Tensor, out: Tensor, m: Tensor, z: Tensor,
                 scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of q, k and v [B, N, 3, H, D], and of policy."""
    dqkv = gradients_like(q)
    dpolicy = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _run(scale, eps, (q, k, v, policy, out, m, z), dout, dqkv, dpolicy)
    return dqkv, dpolicy.sum(1).to(policy.dtype)


def _run(scale: float, eps: float, forward: tuple[Tensor, ...], dout: Tensor | None = None, *gradients: Tensor) -> None:
    q, k, v, policy, *rest = forward
    native.require(OP, refuses_cpp(q.device, q.dtype) is None, q)
    policy = policy.float().contiguous()  # named: it must outlive the call
    _native.policy_attention_cpu(_params(scale, eps, (q, k, v, policy, *rest), dout, *gradients), torch.get_num_threads())


def _params(scale: float, eps: float, forward: tuple[Tensor, ...], dout: Tensor | None, *rest: Tensor):
    """The struct of both; rest: gradients and what else it ends with."""
    q, k, v, policy, out, *_ = forward
    strided = (q, k, v, out, out if dout is None else dout)
    alike = all((t.dtype, t.shape, t.device) == (q.dtype, q.shape, q.device) for t in strided)
    native.require(OP, alike and policy.shape == (q.shape[0], q.shape[2]) and policy.device == q.device, *strided, policy)
    addresses = [0 if t is None else t.data_ptr() for t in (*forward, dout, *rest, *(None,) * (5 - len(rest)))]
    return _native.PolicyAttentionParams(tuple(addresses), tuple(q.shape), tuple(s for t in strided for s in t.stride()), scale, eps,
                                         q.dtype == torch.bfloat16)


def refuses_cuda(device: torch.device, dtype: torch.dtype, *, fits: bool = True, **_) -> str | None:
    """Why `cuda` cannot serve, or None. dtype: of q, k and v; fits: whether a head's width is a multiple of 16 up to 128."""
    if reason := native.reason_cuda(device, OP):
        return reason
    if dtype not in KINDS:
        return f"no kernel for {dtype}"
    return None if fits else "a head's width is not a multiple of 16 in 16..128"


def cuda(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], laid out as [B, N, H, D]; row maxima (in units of log 2) and sums [B, H, N], float32. In one launch."""
    out, m, z = outputs(q)
    q, k, v, policy = _aligned(q), _aligned(k), _aligned(v), policy.float().contiguous()
    _launch(OP, "forward", 1, _params(scale, eps, (q, k, v, policy, out, m, z), None), q)
    return out, m, z


def backward_cuda(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, policy: Tensor, out: Tensor, m: Tensor, z: Tensor,
                  scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of q, k and v [B, N, 3, H, D], and of policy, in two launches."""
    dqkv = gradients_like(q)
    dpolicy, delta, dm = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(3))
    top = torch.empty(q.shape[:3], dtype=torch.int32, device=q.device)
    dout, q, k, v, out = map(_aligned, (dout, q, k, v, out))
    kept = policy.float().contiguous()
    params = _params(scale, eps, (q, k, v, kept, out, m, z), dout, dqkv, dpolicy, delta, dm, top)
    _launch(f"{OP}_backward", "query_gradient", 2, params, q)  # writes delta, dm and top
    _launch(f"{OP}_backward", "key_gradient", 2, params, q)
    return dqkv, dpolicy.sum(1).to(policy.dtype)


def _launch(source: str, which: str, own: int, params, q: Tensor) -> None:
    """own: tensors of which a thread block owns rows, as in csrc/cuda/policy_attention.h."""
    B, H, N, D = q.shape
    native.require(OP, q.dtype in KINDS and D % 16 == 0 and D <= 128, q)
    width = next(w for w in (32, 64, 128) if D <= w)
    warps = 2 // own if width * q.element_size() > 256 else 4
    native.launch(source, f"{OP}_{which}_{KINDS[q.dtype]}_{width}", (B * H * -(-N // (16 * warps)), 1), 32 * warps, params, q.device)


def _aligned(t: Tensor) -> Tensor:
    """t [B, H, N, D], or a copy of which rows can be read 16 bytes at a time."""
    unit = 16 // t.element_size()
    fits = t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(s % unit == 0 for s in t.stride()[:3])
    return t if fits else t.clone(memory_format=torch.contiguous_format)
