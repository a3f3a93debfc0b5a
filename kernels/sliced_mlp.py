"""The MLP over live hidden blocks in two products, GELU, bias and residual in their epilogues; its gradients over live blocks only."""
import functools

from torch import Tensor

from ..ops.sliced_mlp import by_products, gradients_by_products
from .policy_attention import on
from .sliced_linear import configured
from .sliced_product import candidates, default, refuses
from .sliced_product_large import column_sums, product

OP = "sliced_mlp"

__all__ = ["candidates", "default", "launch", "launch_backward", "refuses"]


def launch(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, live: Tensor | None, residual: Tensor | None,
           width: int, config: dict | None = None) -> Tensor:
    """`vitprune.ops.sliced_mlp`."""
    config = config or configured(OP, x, w1, live, width)
    with on(x.device):
        return by_products(functools.partial(product, config=config), x, w1, b1, w2, b2, live, residual, width)


def launch_backward(dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, live: Tensor | None, width: int,
                    of_x: bool = True, of_w: bool = True, config: dict | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and b2; empty where not asked for."""
    config = config or configured(OP, x, w1, live, width)
    with on(x.device):
        return gradients_by_products(functools.partial(product, config=config), dy, x, w1, b1, w2, live, width, of_x, of_w, column_sums)
