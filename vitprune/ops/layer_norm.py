"""LayerNorm over the channels, where no residual goes before it."""
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import fail, on_device
from .registry import KEYS, Backend, call, choose, define, find, large, serve

OP = "layer_norm"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al., Layer Normalization, 2016, eq. 4).

    x [..., C]; weight and bias [C], bias may be None. Returns [..., C]. Raises ValueError for shapes, dtypes or devices that do not fit
    together.
    """
    x.dim() > 0 or fail(OP, "x", "[..., C]", x.shape)
    x.dtype.is_floating_point or fail(OP, "x", "floating point", x.dtype)
    C = x.shape[-1:]
    for name, t in (("weight", weight), ("bias", bias)):
        t is None or t.shape == C or fail(OP, name, f"[C] = {tuple(C)}", t.shape)
        t is None or t.dtype.is_floating_point or fail(OP, name, "floating point", t.dtype)
    on_device(OP, "x", x.device, weight=weight, bias=bias)
    facts = {"weight": weight.dtype, "wide": True if C[0] > 4096 else False, "large": large(prod(x.shape[:-1]))}
    if x.device.type in KEYS and torch.is_autocast_enabled(x.device.type):
        facts["autocast"] = True
    return call(OP, choose(OP, x.device, x.dtype, **facts), x, weight, bias, eps)


def by_module(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x): by the operator where its kernel may serve; it has neither gradient nor autocast, and a backend that is forced for the
    other operators is no reason to fail."""
    autocast = x.device.type in KEYS and torch.is_autocast_enabled(x.device.type)
    return norm(x) if torch.is_grad_enabled() or autocast else layer_norm(x, norm.weight, norm.bias, norm.eps)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The definition."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


define(OP, "(Tensor x, Tensor weight, Tensor? bias, float eps, str backend) -> Tensor",
       lambda x, weight, bias, eps, backend: find(OP, backend).run(x, weight, bias, eps),
       lambda x, weight, bias, eps, backend: x.new_empty(x.shape), macs=lambda *_: 0)


def _triton(*args):  # Triton is slow to import: only when it is asked for
    from ..kernels import layer_norm as triton
    return triton.launch(*args)


def _triton_refuses(device, dtype, **facts) -> str | None:
    from .. import kernels
    if reason := kernels.reason(device):
        return reason
    from ..kernels import layer_norm as triton
    return triton.refuses(device, dtype, **facts)


# As for add_norm: a launch from Python takes longer than it gains on an H200, in CUDA graphs it does not count.
serve(OP, Backend("reference", reference, composite=True), Backend("triton", _triton, refuses=_triton_refuses))
