"""A dense linear layer by the fastest library call, exact GELU in its epilogue."""
import functools
import platform

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .checks import fail


def linear(x: Tensor, w: Tensor, b: Tensor | None, *, gelu: bool = False, residual: Tensor | None = None,
           packed: Tensor | None = None) -> Tensor:
    """residual + x w^T + b, or gelu(x w^T + b); x [..., I], w [O, I], b [O] or None, residual [..., O] or None -> [..., O].

    On an x86 CPU, without gradients, by oneDNN, which adds the bias and the residual or applies GELU while it writes the
    product. PyTorch's separate calls elsewhere. packed: w as `pack` lays it out. Raises ValueError for a residual with GELU.
    """
    if gelu and residual is not None:
        fail("linear", "residual", "None together with gelu", "both")
    if _onednn_serves(x, w, b) and (residual is None or residual.dtype == x.dtype):
        w = w if packed is None else packed
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, w, b, "add")
        return torch.ops.mkldnn._linear_pointwise(x, w, b, "gelu" if gelu else "none", [], "none" if gelu else "")
    y = F.linear(x, w, b)
    if residual is not None:
        return residual + y
    return F.gelu(y) if gelu else y


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """layer.weight and layer.bias, without the search of `Module.__getattr__`: in a small call the host is what takes the time."""
    try:
        return layer._parameters["weight"], layer._parameters["bias"]
    except KeyError:  # something else stands for them, a view of parameters kept elsewhere
        return layer.weight, layer.bias


def watched(module: nn.Module) -> bool:
    """Whether a hook, or a forward of the module's own, expects to be called; hooks of all modules at once, as FLOP counters set them,
    change nothing."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
                or "forward" in module.__dict__)


def pack(w: Tensor, rows: int) -> Tensor | None:
    """w [O, I] as oneDNN reads it where x has so many rows, a copy; None where it does not serve."""
    with torch.inference_mode():
        if not _onednn_serves(w, w, None):
            return None
        return torch.ops.mkldnn._reorder_linear_weight(w.detach(), rows)


def _onednn_serves(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or w.dtype != x.dtype:
        return False
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():  # it would drop the tangents
        return False
    if 0 in x.shape or 0 in w.shape:
        return False
    if not (torch.backends.mkldnn.enabled and _available() and (x.dtype == torch.float32 or _bfloat16())):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)))


@functools.cache
def _available() -> bool:
    found = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    if found:
        @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
        def _flops(x_shape, *_, out_shape=None, **__) -> int:
            return 2 * x_shape[-1] * torch.Size(out_shape).numel()
    return found


@functools.cache
def _bfloat16() -> bool:
    """Whether oneDNN has products in bfloat16: not for processors with AVX2 alone."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
