"""Residual add and LayerNorm in one pass."""
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..native import add_norm as native
from .checks import fail, on_device
from .registry import Backend, call, choose, define, find, gradient, large, run, serve

OP = "add_norm"


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *,
             gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = x + gamma * residual and LayerNorm(s); gamma is LayerScale (Touvron et al., CaiT, 2021, eq. 4).

    x, residual [..., C]; weight, bias, gamma [C] (bias and gamma may be None). Returns (s, normalised), both [..., C].
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    x.dim() > 0 or fail(OP, "x", "[..., C]", x.shape)
    x.dtype.is_floating_point or fail(OP, "x", "floating point", x.dtype)
    residual.shape == x.shape or fail(OP, "residual", f"like x, {tuple(x.shape)}", residual.shape)
    C = x.shape[-1:]
    for name, t in (("weight", weight), ("bias", bias), ("gamma", gamma)):
        t is None or t.shape == C or fail(OP, name, f"[C] = {tuple(C)}", t.shape)
        t is None or t.dtype.is_floating_point or fail(OP, name, "floating point", t.dtype)
    on_device(OP, "x", x.device, residual=residual, weight=weight, bias=bias, gamma=gamma)
    # A branch on the size, not the size: a graph traced with dynamic sizes needs constants to choose by.
    facts = {"residual": residual.dtype, "weight": weight.dtype, "gamma": (weight if gamma is None else gamma).dtype,
             "wide": True if C[0] > 4096 else False, "large": large(prod(x.shape[:-1]))}
    return call(OP, choose(OP, x.device, x.dtype, **facts), x, residual, weight, bias, gamma, eps)


def reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
              eps: float) -> tuple[Tensor, Tensor]:
    """The definition."""
    s = x + (residual if gamma is None else residual * gamma)
    return s, F.layer_norm(s, s.shape[-1:], weight, bias, eps).to(s.dtype)  # CUDA's autocast makes it float32, which no kernel does


def _backward(ds, dy, s, residual, weight, gamma, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight, bias, gamma; the row statistics are recomputed in the accumulator's precision."""
    if backend == "triton":
        from ..kernels import add_norm as triton
        return triton.launch_backward(ds, dy, s, residual, weight, gamma, eps)
    if backend == "cuda":
        return native.backward_cuda(ds, dy, s, residual, weight, gamma, eps)
    dtype = torch.promote_types(s.dtype, torch.float32)
    wide = s.to(dtype)
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    normal, dy = (wide - mean) * rstd, dy.to(dtype)
    dn = dy * weight.to(dtype)
    dx = (dn - dn.mean(-1, keepdim=True) - normal * (dn * normal).mean(-1, keepdim=True)) * rstd + ds.to(dtype)
    rows = tuple(range(s.dim() - 1))
    dresidual = dx if gamma is None else dx * gamma.to(dtype)
    return (dx.to(s.dtype), dresidual.to(residual.dtype, copy=True), (dy * normal).sum(rows).to(weight.dtype),
            dy.sum(rows).to(weight.dtype), (dx * residual.to(dtype)).sum(rows).to(weight.dtype))


def _setup(ctx, inputs, output) -> None:
    x, residual, weight, bias, gamma, ctx.eps, ctx.backend = inputs
    ctx.dtype, ctx.bias = x.dtype, bias is not None
    ctx.save_for_backward(output[0], residual, weight, gamma)


def _gradient(ctx, ds, dy):
    dx, dresidual, dweight, dbias, dgamma = run(OP + "_backward", ds, dy, *ctx.saved_tensors, ctx.eps, ctx.backend)
    gamma = ctx.saved_tensors[-1]
    return dx.to(ctx.dtype), dresidual, dweight, dbias if ctx.bias else None, None if gamma is None else dgamma, None, None


def _fake(x, residual, weight, bias, gamma, eps, backend):
    s = torch.empty(x.shape, dtype=torch.result_type(x, residual), device=x.device)
    if gamma is not None:
        s = s.to(torch.promote_types(s.dtype, gamma.dtype))
    return s, torch.empty_like(s)


define(OP, "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? gamma, float eps, str backend) -> (Tensor, Tensor)",
       lambda x, residual, weight, bias, gamma, eps, backend: find(OP, backend).run(x, residual, weight, bias, gamma, eps),
       _fake, macs=lambda *_: 0)
define(OP + "_backward", "(Tensor ds, Tensor dy, Tensor s, Tensor residual, Tensor weight, Tensor? gamma, float eps, "
       "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _backward,
       lambda ds, dy, s, residual, weight, gamma, eps, backend: (
           torch.empty(s.shape, dtype=s.dtype, device=s.device), torch.empty(s.shape, dtype=residual.dtype, device=s.device),
           *(torch.empty(weight.shape, dtype=weight.dtype, device=s.device) for _ in range(3))), macs=lambda *_: 0)
gradient(OP, _gradient, _setup)


def _triton(*args):  # Triton is slow to import: only when it is asked for
    from ..kernels import add_norm as triton
    return triton.launch(*args)


def _triton_refuses(device, dtype, **facts) -> str | None:
    from .. import kernels
    if reason := kernels.reason(device):
        return reason
    from ..kernels import add_norm as triton
    return triton.refuses(device, dtype, **facts)


# Plain PyTorch is faster on an H200 in eager mode, where launches from Python count; in CUDA graphs dispatch files name Triton.
serve(OP, Backend("reference", reference, composite=True), Backend("triton", _triton, refuses=_triton_refuses),
      Backend("cuda", native.cuda, refuses=native.refuses))
