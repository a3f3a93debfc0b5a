"""`vitprune.ops.policy_attention` in C++."""
import torch
from torch import Tensor

from .. import native
from . import _native


def refuses_cpp(device: torch.device, dtype: torch.dtype, **_) -> str | None:
    """Why `cpp` cannot serve, or None. dtype: of q, k and v."""
    return native.reason_cpp(device) or (None if dtype in (torch.float32, torch.bfloat16) else f"no kernel for {dtype}")


def cpp(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], a transposed [B, N, H, D]; row maxima and sums [B, H, N], float32."""
    B, H, N, D = q.shape
    out = torch.empty(B, N, H, D, dtype=q.dtype).transpose(1, 2)
    m, z = torch.empty(B, H, N), torch.empty(B, H, N)
    _run(scale, eps, (q, k, v, policy, out, m, z))
    return out, m, z


def backward_cpp(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, policy: Tensor, out: Tensor, m: Tensor, z: Tensor,
                 scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and policy; m is held constant, which changes them by the order of eps."""
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    dpolicy = torch.empty(q.shape[:3])
    _run(scale, eps, (q, k, v, policy, out, m, z), dout, dq, dk, dv, dpolicy)
    return dq, dk, dv, dpolicy.sum(1).to(policy.dtype)


def _run(scale: float, eps: float, forward: tuple[Tensor, ...], dout: Tensor | None = None, *gradients: Tensor) -> None:
    q, k, v, policy, out, m, z = forward
    policy = policy.float().contiguous()
    strided = (q, k, v, out, out if dout is None else dout)
    addresses = [0 if t is None else t.data_ptr() for t in (q, k, v, policy, out, m, z, dout, *(gradients or (None,) * 4))]
    params = _native.PolicyAttentionParams(tuple(addresses), tuple(q.shape), tuple(s for t in strided for s in t.stride()), scale, eps,
                                           q.dtype == torch.bfloat16)
    _native.policy_attention_cpu(params, torch.get_num_threads())
