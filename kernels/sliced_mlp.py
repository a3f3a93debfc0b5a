"""The MLP over live hidden blocks in two products, GELU, bias and residual in their epilogues; its gradients over live blocks only."""
import torch
from torch import Tensor

from .sliced_linear import check, configured, rows, spread
from .sliced_product import candidates, default, on, product, refuses

OP = "sliced_mlp"

__all__ = ["candidates", "default", "launch", "launch_backward", "refuses"]


def launch(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, live: Tensor, residual: Tensor | None, width: int,
           config: dict | None = None) -> Tensor:
    """`vitprune.ops.sliced_mlp`."""
    for w in (w1, w2):
        check(OP, x, w)
    flat, live = rows(x), live.contiguous()
    config = config or configured(OP, flat, w1, live, width)
    b1, b2 = (b if b is None else b.contiguous() for b in (b1, b2))
    hidden = torch.empty(len(flat), len(live) * width, dtype=x.dtype, device=x.device)
    y = torch.empty(len(flat), w2.shape[0], dtype=x.dtype, device=x.device)
    with on(x.device):
        product(flat, w1.t(), hidden, live, width, config, live_columns=True, bias=b1, epilogue="gelu")
        product(hidden, w2.t(), y, live, width, config, live_depth=True, bias=b2, other=residual if residual is None else rows(residual))
    return y.view(*x.shape[:-1], y.shape[1])


def launch_backward(dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, live: Tensor, width: int,
                    config: dict | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and b2; of dead units zero, and never computed. The hidden layer is computed again."""
    flat, dy, live = rows(x), rows(dy), live.contiguous()
    config = config or configured(OP, flat, w1, live, width)
    hidden, dh = (torch.empty(len(flat), len(live) * width, dtype=x.dtype, device=x.device) for _ in range(2))
    dx, dw1, dw2 = torch.empty(flat.shape, dtype=x.dtype, device=x.device), torch.zeros_like(w1), torch.zeros_like(w2)
    with on(x.device):
        product(flat, w1.t(), hidden, live, width, config, live_columns=True, bias=b1 if b1 is None else b1.contiguous())
        product(dy, w2, dh, live, width, config, live_columns=True, other=hidden, epilogue="gelu gradient")  # hidden: now after the GELU
        product(dh, w1, dx, live, width, config, live_depth=True)
        product(dh.t(), flat, dw1, live, width, config, live_rows=True)
        product(dy.t(), hidden, dw2, live, width, config, full_columns=True)
        return dx.view(x.shape), dw1, spread(w1[:, 0], live, width, dh.sum(0)), dw2, dy.sum(0).to(w2.dtype)
