"""Residual add and LayerNorm in one pass."""
from math import prod

import torch
from torch import Tensor

from ..native import add_norm as native
from ..native.add_norm import alike, outputs
from .checks import check_float, check_tensors, fail, is_eps
from .layer_norm import reference as normalised
from .registry import Backend, call, choose, define, find, gradient, large, run, serve
from .triton import kernel, triton

OP = "add_norm"


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *,
             gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = x + gamma * residual and LayerNorm(s); gamma is LayerScale (Touvron et al., CaiT, 2021, eq. 4).

    x, residual [..., C]; weight, bias, gamma [C] (bias and gamma may be None). Returns (s, normalised), both [..., C].
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    check_tensors(OP, ("bias", "gamma"), x=x, residual=residual, weight=weight, bias=bias, gamma=gamma)
    shape, dtype, device = x.shape, x.dtype, x.device
    shape or fail(OP, "x", "[..., C]", shape)
    check_float(OP, x=x, residual=residual, weight=weight, bias=bias, gamma=gamma)
    residual.shape == shape or fail(OP, "residual", f"like x, {tuple(shape)}", residual.shape)
    *rows, C = shape
    is_eps(eps) or fail(OP, "eps", "a number >= 0", repr(eps))
    for name, t in (("weight", weight), ("bias", bias), ("gamma", gamma)):
        t is None or t.shape == (C,) or fail(OP, name, f"[C] = {(C,)}", t.shape)
    bias is None or bias.dtype == weight.dtype or fail(OP, "bias", f"{weight.dtype} as weight", bias.dtype)
    # A branch on the size, not the size: a graph traced with dynamic sizes needs constants to choose by.
    facts = {"residual": residual.dtype, "weight": weight.dtype, "gamma": (weight if gamma is None else gamma).dtype,
             "wide": True if C > 4096 else False, "large": large(prod(rows))}
    return call(OP, choose(OP, device, dtype, **facts), x, residual, weight, bias, gamma, eps)


def reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
              eps: float) -> tuple[Tensor, Tensor]:
    """The definition."""
    s = x + (residual if gamma is None else residual * gamma)
    y = normalised(s, weight, bias, eps)
    return s, y if y.dtype == s.dtype else y.to(s.dtype)  # CUDA's autocast makes it float32, which no kernel does


def _backward(ds, dy, s, residual, weight, gamma, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight, bias, gamma; the row statistics are recomputed in the accumulator's precision.

    Without gamma the residual need only have its dtype, and gamma's gradient is empty; so is the residual's where x's is the same."""
    if backend == "triton":
        return kernel(OP).launch_backward(ds, dy, s, residual, weight, gamma, eps)
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
    dresidual = residual.new_empty(0) if alike(s, residual, gamma) else dresidual.to(residual.dtype, copy=True)
    dgamma = weight.new_empty(0) if gamma is None else (dx * residual.to(dtype)).sum(rows).to(weight.dtype)
    return dx.to(s.dtype), dresidual, (dy * normal).sum(rows).to(weight.dtype), dy.sum(rows).to(weight.dtype), dgamma


def _setup(ctx, inputs, output) -> None:
    x, residual, weight, bias, gamma, ctx.eps, ctx.backend = inputs
    ctx.dtype, ctx.bias = x.dtype, bias is not None
    ctx.save_for_backward(output[0], residual.new_empty(0) if gamma is None else residual, weight, gamma)


def _gradient(ctx, ds, dy):
    s, residual, weight, gamma = ctx.saved_tensors
    dx, dresidual, dweight, dbias, dgamma = run(OP + "_backward", ds, dy, s, residual, weight, gamma, ctx.eps, ctx.backend)
    dresidual = dx if alike(s, residual, gamma) else dresidual
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
       lambda ds, dy, s, residual, weight, gamma, eps, backend: outputs(s, residual, weight, gamma), macs=lambda *_: 0)
gradient(OP, _gradient, _setup)


# Plain PyTorch is faster on an H200 in eager mode, where launches from Python count; in CUDA graphs dispatch files name Triton.
serve(OP, Backend("reference", reference, composite=True), triton(OP), Backend("cuda", native.cuda, refuses=native.refuses))
