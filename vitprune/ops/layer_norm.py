"""LayerNorm over the channels, where no residual goes before it."""
from math import prod

import torch
from torch import Tensor, nn

from .checks import check_float, check_tensors, fail, is_eps
from .linear import weight_and_bias
from .registry import Backend, autocasts, call, choose, define, find, large, serve
from .triton import triton

OP = "layer_norm"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al., Layer Normalization, 2016, eq. 4).

    x [..., C]; weight and bias [C], bias may be None. Returns [..., C]. Raises ValueError for shapes, dtypes or devices that do not fit
    together.
    """
    check_tensors(OP, ("bias",), x=x, weight=weight, bias=bias)
    x.dim() > 0 or fail(OP, "x", "[..., C]", x.shape)
    dtype, device = x.dtype, x.device
    *rows, C = x.shape
    check_vectors(OP, x, weight, bias, eps)
    facts = {"weight": weight.dtype, "wide": True if C > 4096 else False, "large": large(prod(rows))}
    if autocasts(device):
        facts["autocast"] = True
    return call(OP, choose(OP, device, dtype, **facts), x, weight, bias, eps)


def check_vectors(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    """Raise ValueError where weight and bias are not those of x's channels, or eps is negative or no number."""
    check_float(op, x=x, weight=weight, bias=bias)
    is_eps(eps) or fail(op, "eps", "a number >= 0", repr(eps))
    C = x.shape[-1]
    for name, t in (("weight", weight), ("bias", bias)):
        t is None or t.shape == (C,) or fail(op, name, f"[C] = {(C,)}", t.shape)
    bias is None or bias.dtype == weight.dtype or fail(op, "bias", f"{weight.dtype} as weight", bias.dtype)


def by_module(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x): by the operator where its kernel may serve; it has neither gradient nor autocast, and a backend that is forced for the
    other operators is no reason to fail."""
    return norm(x) if left_to_modules(x.device) else layer_norm(x, *weight_and_bias(norm), norm.eps)


def left_to_modules(device: torch.device) -> bool:
    """Whether a gradient may be asked for, autocast decides, or a trace tells parts by modules."""
    return torch.is_grad_enabled() or autocasts(device) or torch.jit.is_tracing()


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The definition; in the wider of two dtypes where PyTorch takes one alone."""
    if weight.dtype == x.dtype or _mixes(x, weight):
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    y = torch.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias if bias is None else bias.to(wide), eps)
    return y.to(x.dtype)


def _mixes(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch takes these two dtypes together: halves and float32 on a CPU, any under autocast elsewhere."""
    return x.element_size() == 2 and weight.dtype == torch.float32 if x.device.type == "cpu" else autocasts(x.device)


define(OP, "(Tensor x, Tensor weight, Tensor? bias, float eps, str backend) -> Tensor",
       lambda x, weight, bias, eps, backend: find(OP, backend).run(x, weight, bias, eps),
       lambda x, weight, bias, eps, backend: x.new_empty(x.shape), macs=lambda *_: 0)


# As for add_norm: a launch from Python takes longer than it gains on an H200, in CUDA graphs it does not count.
serve(OP, Backend("reference", reference, composite=True), triton(OP))
