"""The dense parts of a timm vision transformer by the fastest calls there are; hooks see their modules as ever."""
import contextlib
import threading
from collections.abc import Iterator

from timm.layers import GELU, DropPath, Format, LayerNorm, PatchEmbed
from torch import Tensor, nn

from . import ops
from .ops.layer_norm import by_module
from .ops.linear import watched, weight_and_bias

_DROPS = (nn.Dropout, nn.Identity, DropPath)


class _Local(threading.local):  # torch.compile traces no ContextVar before torch 2.11
    def __init__(self) -> None:
        self.alive_only = False  # no attribute of the class, which graphs would not be guarded by


_local = _Local()


def alive_only() -> bool:
    """Whether hooks on masked layers are those of `unwatched`."""
    return _local.alive_only


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside, hooks are this package's own, for whose sake nothing is computed that is dead: they do not see masked layers called."""
    previous, _local.alive_only = _local.alive_only, True
    try:
        yield
    finally:
        _local.alive_only = previous


def plain(layer: nn.Module, whatever_hooks: bool = False) -> bool:
    """Whether weight and bias are all there is to it: a linear layer that nobody watches, wrapped or replaced."""
    return type(layer) is nn.Linear and "forward" not in layer.__dict__ and (whatever_hooks or not watched(layer))


def exact_gelu(act: nn.Module, whatever_hooks: bool = False) -> bool:
    """Whether it is the GELU that kernels compute, and nobody watches or replaced it."""
    exact = type(act) is GELU or type(act) is nn.GELU and act.approximate == "none"
    return exact and "forward" not in act.__dict__ and (whatever_hooks or not watched(act))


def idle(dropout: nn.Module, whatever_hooks: bool = False) -> bool:
    """Whether it does nothing now: dropout, or a path of stochastic depth, in evaluation or of a rate of 0, that nobody watches."""
    return (type(dropout) in _DROPS and "forward" not in dropout.__dict__ and (whatever_hooks or not watched(dropout))
            and not (dropout.training and (getattr(dropout, "p", 0) or getattr(dropout, "drop_prob", 0))))


def dense(layer: nn.Module, x: Tensor, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    """act(layer(x)) or residual + layer(x), in one call where both are as timm made them and nobody watches them."""
    if plain(layer) and (act is None or exact_gelu(act)):
        return ops.linear(x, *weight_and_bias(layer), gelu=act is not None, residual=residual, packed=layer.__dict__.get("packed"))
    x = layer(x)
    x = x if act is None else act(x)
    return x if residual is None else residual + x


def drop(dropout: nn.Module, x: Tensor) -> Tensor:
    """Dropout, or a path of stochastic depth; in evaluation not even called, which at batch 1 is a percent of the time."""
    skips = type(dropout) in _DROPS and not dropout.training and not watched(dropout)
    return x if skips else dropout(x)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x); LayerNorm by the operator where nobody watches it."""
    return by_module(norm, x) if plain_norm(norm) else norm(x)


def plain_norm(norm: nn.Module) -> bool:
    """Whether it is LayerNorm over the channels as PyTorch or timm made it, and nobody watches it."""
    plain = type(norm) in (nn.LayerNorm, LayerNorm) and norm.weight is not None and len(norm.normalized_shape) == 1
    return plain and not watched(norm) and not norm.__dict__.get("_fast_norm")


class PatchProduct(PatchEmbed):
    """timm's `PatchEmbed` (same arguments, same parameter names) as one matrix product, since patches do not overlap.

    Pruning does not make this part smaller: by cuDNN's convolution it was a quarter of a pruned DeiT-S on an H200.
    """

    def _prepare(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> patches [B, N, C], or [B, H/h, W/w, C] where sizes are free; other convolutions and padding are timm's, as
        are patches that leave a rest."""
        (B, C, H, W), (h, w), conv = x.shape, self.patch_size, self.proj
        plain = type(conv) is nn.Conv2d and conv.kernel_size == conv.stride == (h, w) and conv.padding == (0, 0)
        plain = plain and conv.dilation == (1, 1) and conv.groups == 1 and not watched(conv)
        plain = plain and (self.flatten or self.output_fmt == Format.NHWC)
        fits = self.img_size is None or not self.strict_img_size or (H, W) == self.img_size
        if not (plain and fits and H % h == 0 and W % w == 0):
            return super().forward(x)
        x = x.reshape(B, C, H // h, h, W // w, w).permute(0, 2, 4, 1, 3, 5).reshape(B, H // h * (W // w), C * h * w)
        x = ops.linear(x, conv.weight.flatten(1), conv.bias)
        return self.norm(x if self.flatten else x.unflatten(1, (H // h, W // w)))
