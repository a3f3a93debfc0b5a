"""Attention under DynamicViT's key policy: differentiable in q, k, v and the policy itself.

Source: Rao et al., DynamicViT (2021), eq. 8-11, with the official code's eps.
"""

import torch
from torch import Tensor

from ..native import policy_attention as native
from . import registry
from .checks import check_float, check_tensors, fail, is_finite, is_int
from .registry import Backend, call, choose, define, find, gradient, large, run, serve
from .triton import kernel, triton

OP = "policy_attention"


def policy_attention(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, *, scale: float | None = None,
                     eps: float = 1e-6) -> Tensor:
    """softmax(q k^T * scale) v in which key j counts policy_j for every other token; a token always sees itself.

    q, k, v [B, H, N, D], any strides; policy [B, N] in 0..1, 1 keeps a key and 0 drops it. Returns [B, H, N, D].
    With P_ij = p_j for i != j and 1 for i = j, and e_ij = exp(s_ij - m_i): A_ij = (e_ij P_ij + eps/N) / (sum_j e_ij P_ij + eps).
    eps > 0 takes m_i over all keys, as the official code does; eps = 0 takes it over kept keys and the token itself,
    so the result is finite however large a dropped score is, and NaN or infinities in dropped tokens stay in their rows; not so
    in gradients, whose products with zeros they turn to NaN in all backends but "cpp".
    Raises ValueError for arguments whose shapes, dtypes or devices do not fit together.
    """
    B, H, N, D = _check(q, k, v, policy, eps)
    scale is None or is_finite(scale) or fail(OP, "scale", "a finite number (it has no gradient)", repr(scale))
    if q.numel() == 0:
        return v + 0 * (q + k + policy.sum())  # each has a gradient
    fits = True if D % 16 == 0 and 16 <= D <= 128 else False  # a branch, not the size: a graph with dynamic sizes has none to choose by
    name = choose(OP, q.device, q.dtype, fits=fits, large=large(B * N))
    return call(OP, name, q, k, v, policy, D ** -0.5 if scale is None else scale, eps)[0]


class _Split(torch.autograd.Function):
    """Views of a fused buffer, whose gradient, where a kernel has written it as one buffer, is taken as it lies."""

    @staticmethod
    def forward(ctx, qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        return _heads(qkv, num_heads)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (B, H, N, D), first = grads[0].shape, grads[0]
        C = H * D

        def follows(i: int, g: Tensor) -> bool:
            laid_out = type(g) is Tensor and g.dtype == first.dtype and g.stride() == (3 * N * C, D, 3 * C, 1)
            return (laid_out and g.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
                    and g.storage_offset() == first.storage_offset() + i * C)
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
                     or torch._C._functorch.is_legacy_batchedtensor(first))
        side_by_side = plain and all(follows(i, g) for i, g in enumerate(grads))
        if side_by_side:
            return first.as_strided((B, N, 3 * C), (3 * N * C, 3 * C, 1)), None
        return torch.stack(grads, 2).transpose(1, 3).reshape(B, N, 3 * C), None


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k and v [B, H, N, D], views of a fused buffer qkv [B, N, 3*H*D].

    The gradient that kernels of `policy_attention` give for them is one buffer already and not copied together again, which in a training
    step of DeiT-S on an H200 took nearly as long as the gradient of the keys; it shares its memory with theirs. Raises ValueError where
    heads do not divide the channels.
    """
    check_tensors("split_qkv", qkv=qkv)
    qkv.dim() == 3 or fail("split_qkv", "qkv", "[B, N, 3*H*D]", qkv.shape)
    (is_int(num_heads) and num_heads > 0 and qkv.shape[-1] % (3 * num_heads) == 0) or fail(
        "split_qkv", "num_heads", f"a divisor of {qkv.shape[-1]} / 3 channels", repr(num_heads))
    plain = not (torch.is_grad_enabled() and qkv.requires_grad) or registry.transformed()
    return _heads(qkv, num_heads) if plain else _Split.apply(qkv, num_heads)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads))).transpose(1, 3).unbind(2)


def _check(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, eps: float) -> torch.Size:
    check_tensors(OP, q=q, k=k, v=v, policy=policy)
    q.dim() == 4 or fail(OP, "q", "[B, H, N, D]", q.shape)
    for name, t in (("k", k), ("v", v)):
        t.shape == q.shape or fail(OP, name, f"like q, {tuple(q.shape)}", t.shape)
        t.dtype == q.dtype or fail(OP, name, f"of q's dtype {q.dtype}", t.dtype)
    check_float(OP, q=q)
    expected = (q.shape[0], q.shape[2])
    policy.shape == expected or fail(OP, "policy", f"[B, N] = {expected}", policy.shape)
    check_float(OP, policy=policy)
    (is_finite(eps) and eps >= 0) or fail(OP, "eps", "a finite number >= 0", repr(eps))
    return q.shape


def softmax_with_policy(scores: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """The attention weights under a policy: scores [B, H, N, N] and policy [B, N] -> [B, H, N, N]; eps > 0.

    Half precision rounds exactly as the official code: the row maximum is subtracted before the cast to float32.
    """
    N = scores.shape[-1]
    p = _pairs(policy[:, None, None, :])
    top = scores.max(dim=-1, keepdim=True)[0]
    accumulate = _accumulator(scores.dtype)
    e = (scores - top).to(accumulate).exp() * p.to(accumulate)
    return ((e + eps / N) / (e.sum(-1, keepdim=True) + eps)).to(scores.dtype)


def _pairs(p: Tensor) -> Tensor:  # [B, 1, 1, N] -> P_ij [B, 1, N, N]
    return p + (1 - p) * torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _weights(q: Tensor, k: Tensor, policy: Tensor, scale: float, eps: float) -> tuple[Tensor, ...]:
    """Unnormalised weights e [B, H, N, N], pair policy P, row maximum m and sum z [B, H, N, 1], in the accumulator."""
    dtype = _accumulator(q.dtype)
    q, k, p = q.to(dtype), k.to(dtype), policy.to(dtype)
    pairs = _pairs(p[:, None, None, :])
    if eps > 0:
        s = q @ k.transpose(-2, -1) * scale
        m = s.amax(-1, keepdim=True).detach()
        e = (s - m).exp()
    else:
        own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        seen = own | (policy > 0)[:, None, None, :]
        s = q @ _finite(k, policy).transpose(-2, -1) * scale
        s = torch.where(own, ((q * k).sum(-1) * scale)[..., None], s)
        m = s.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True).detach()
        e = (s - m).clamp(max=80.0).exp()  # a dropped key above every kept one: its policy's gradient stays finite
        e = torch.where(seen, e, e.nan_to_num(0.0))
    return e, pairs, m, (e * pairs).sum(-1, keepdim=True)


def _finite(t: Tensor, policy: Tensor) -> Tensor:
    """t [B, H, N, D] with what is not finite in dropped tokens set to zero."""
    return torch.where((policy > 0)[:, None, :, None] | t.isfinite(), t, 0)


def reference(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float) -> tuple[Tensor]:
    """The definition, in plain PyTorch, O(N^2) memory."""
    if eps > 0:
        return (softmax_with_policy(q @ k.transpose(-2, -1) * scale, policy, eps) @ v,)
    e, pairs, _, z = _weights(q, k, policy, scale, eps)
    return (_mix((e * pairs / z).to(v.dtype), v, policy, eps),)


def _mix(a: Tensor, v: Tensor, policy: Tensor, eps: float) -> Tensor:
    if eps > 0:
        return a @ v
    own = a.diagonal(dim1=-2, dim2=-1)
    return (a - torch.diag_embed(own)) @ _finite(v, policy) + own[..., None] * v


def _forward(q, k, v, policy, scale: float, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend != "reference":
        return find(OP, backend).run(q, k, v, policy, scale, eps)
    e, pairs, m, z = _weights(q, k, policy, scale, eps)
    a = (e * pairs + eps / q.shape[2]) / (z + eps)
    return _mix(a, v.to(a.dtype), policy, eps).to(v.dtype), m[..., 0], z[..., 0]


def _backward(dout, q, k, v, policy, out, m, z, scale: float, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """Closed form: the gradients of q, k and v side by side, [B, N, 3, H, D], and that of the policy."""
    if backend == "triton":
        return kernel("policy_attention_backward").launch(dout, q, k, v, policy, out, m, z, scale, eps)
    if backend == "cpp":
        return native.backward_cpp(dout, q, k, v, policy, out, m, z, scale, eps)
    if backend == "cuda":
        return native.backward_cuda(dout, q, k, v, policy, out, m, z, scale, eps)
    e, pairs, _, _ = _weights(q, k, policy, scale, eps)
    dtype, zp = e.dtype, (z + eps)[..., None]
    a = (e * pairs + eps / q.shape[2]) / zp
    do, clean_k, clean_v = dout.to(dtype), k.to(dtype), v.to(dtype)
    if eps == 0:
        clean_k, clean_v = _finite(clean_k, policy), _finite(clean_v, policy)
    da = do @ clean_v.transpose(-2, -1)
    de = (da - (do * out.to(dtype)).sum(-1, keepdim=True)) / zp
    ds = de * e * pairs
    if eps > 0:  # the row's maximum counts where dropped keys alone are near it
        dm = eps / zp ** 2 * (z[..., None] * da.mean(-1, keepdim=True) - (da * e * pairs).sum(-1, keepdim=True))
        ds = ds.scatter_add(-1, e.argmax(-1, keepdim=True), dm)
    ds = ds * scale
    off = de * e * (1 - torch.eye(q.shape[2], dtype=dtype, device=q.device))
    dqkv = torch.stack((ds @ clean_k, ds.transpose(-2, -1) @ q.to(dtype), a.transpose(-2, -1) @ do)).to(q.dtype)
    return dqkv.permute(1, 3, 0, 2, 4).contiguous(), off.sum((1, 2)).to(policy.dtype)


def _setup(ctx, inputs, output) -> None:
    q, k, v, policy, ctx.scale, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, policy, *output)
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, dout, dm, dz):
    dqkv, dpolicy = run(OP + "_backward", dout, *ctx.saved_tensors, ctx.scale, ctx.eps, ctx.backend)
    return *dqkv.transpose(1, 3).unbind(2), dpolicy, None, None, None


def _fake(q, k, v, policy, scale, eps, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, D = q.shape
    out = q.new_empty(q.shape) if backend == "reference" else q.new_empty(B, N, H, D).transpose(1, 2)
    return out, *(q.new_empty(q.shape[:3], dtype=_accumulator(q.dtype)) for _ in range(2))


def _macs(q, k, v, policy, *_) -> int:
    B, H, N, D = q
    return 2 * B * H * N * N * D


define(OP, "(Tensor q, Tensor k, Tensor v, Tensor policy, float scale, float eps, str backend) -> (Tensor, Tensor, Tensor)",
       _forward, _fake, cast=("q", "k", "v"), macs=_macs)  # the policy's gradient, a sum over heads and rows, may leave float16
define(OP + "_backward", "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor policy, Tensor out, Tensor m, Tensor z, "
       "float scale, float eps, str backend) -> (Tensor, Tensor)", _backward,
       lambda dout, q, k, v, policy, *_: (q.new_empty(q.shape[0], q.shape[2], 3, q.shape[1], q.shape[3]), policy.new_empty(policy.shape)),
       macs=lambda dout, q, *_: 5 * q[0] * q[1] * q[2] ** 2 * q[3])
gradient(OP, _gradient, _setup)
# On an H200 CUDA C++ is faster than Triton, and both than PyTorch compiled.
serve(OP, Backend("cpp", native.cpp, refuses=native.refuses_cpp),
      Backend("cuda", native.cuda, refuses=native.refuses_cuda),
      triton(OP), Backend("reference", reference, composite=True))
