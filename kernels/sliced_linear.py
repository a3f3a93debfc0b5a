"""A linear layer over live blocks, read from the full weights; its gradients too, of dead blocks none."""
import torch
from torch import Tensor

from . import configs
from .sliced_product import candidates, default, on, product, refuses

OP = "sliced_linear"

__all__ = ["candidates", "default", "launch", "launch_backward", "refuses"]


def configured(op: str, x: Tensor, w: Tensor, live: Tensor, width: int) -> dict:
    """The launch configuration of that operator for x [M, ...]."""
    arch, shape = configs.capability(x.device), (("M", x.shape[0]), ("C", w.shape[1]), ("L", len(live) * width))
    return configs.nearest(op, arch, x.dtype, shape) or default(x.dtype, arch, **dict(shape))


def rows(t: Tensor) -> Tensor:
    """[..., C] -> [M, C], a copy only where the rows do not lie evenly."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def spread(like: Tensor, live: Tensor, width: int, values: Tensor) -> Tensor:
    """values [L * width] at their units of a vector of zeros."""
    full = torch.zeros_like(like)
    full.view(-1, width)[live.long()] = values.view(-1, width).to(like.dtype)
    return full


def check(op: str, x: Tensor, w: Tensor) -> None:
    """Tensor cores take one kind of numbers."""
    if x.dtype != w.dtype:
        raise ValueError(f"{op}: w must be {x.dtype} as x, got {w.dtype}")


def launch(x: Tensor, w: Tensor, b: Tensor | None, live: Tensor, side: str, width: int, config: dict | None = None) -> Tensor:
    """`vitprune.ops.sliced_linear`."""
    check(OP, x, w)
    flat, out = rows(x), side == "out"
    y = torch.empty(len(flat), len(live) * width if out else w.shape[0], dtype=x.dtype, device=x.device)
    config = config or configured(OP, flat, w, live, width)
    with on(x.device):
        product(flat, w.t(), y, live.contiguous(), width, config, live_columns=out, live_depth=not out,
                bias=b if b is None else b.contiguous())
    return y.view(*x.shape[:-1], y.shape[1])


def launch_backward(dy: Tensor, x: Tensor, w: Tensor, live: Tensor, side: str, width: int,
                    config: dict | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and b; of dead blocks zero, and never computed."""
    flat, dy, out, live = rows(x), rows(dy), side == "out", live.contiguous()
    config = config or configured(OP, flat, w, live, width)
    dx, dw, db = torch.empty(flat.shape, dtype=x.dtype, device=x.device), torch.zeros_like(w), dy.sum(0).to(w.dtype)
    with on(x.device):
        product(dy, w, dx, live, width, config, live_columns=not out, live_depth=out)
        product(dy.t(), flat, dw, live, width, config, live_rows=out, full_columns=not out)
        return dx.view(x.shape), dw, spread(w[:, 0], live, width, db) if out else db
