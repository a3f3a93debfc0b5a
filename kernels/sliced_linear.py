"""A linear layer over live blocks, read from the full weights; its gradients too, of dead blocks none."""
import functools

from torch import Tensor

from ..native.sliced_product import units
from ..ops.sliced_linear import by_products, gradients_by_products
from . import configs
from .policy_attention import on
from .sliced_product import candidates, default, refuses
from .sliced_product_large import column_sums, product

OP = "sliced_linear"

__all__ = ["candidates", "default", "launch", "launch_backward", "refuses"]


def configured(op: str, x: Tensor, w: Tensor, live: Tensor | None, width: int) -> dict:
    """The launch configuration of that operator for x [..., C]; what was tuned was so beside live units, whose weights are gathered."""
    arch, shape = configs.capability(x.device), (("M", x.shape[:-1].numel()), ("C", w.shape[1]), ("L", units(w.shape[0], live, width)))
    tuned = None if live is None else configs.nearest(op, arch, x.dtype, shape)
    return tuned or default(x.dtype, arch, **dict(shape))


def launch(x: Tensor, w: Tensor, b: Tensor | None, live: Tensor, side: str, width: int, config: dict | None = None) -> Tensor:
    """`vitprune.ops.sliced_linear`."""
    config = config or configured(OP, x, w, live, width)
    with on(x.device):
        return by_products(functools.partial(product, config=config), x, w, b, live, side, width)


def launch_backward(dy: Tensor, x: Tensor, w: Tensor, live: Tensor, side: str, width: int, of_x: bool = True, of_w: bool = True,
                    config: dict | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and b; empty where not asked for."""
    config = config or configured(OP, x, w, live, width)
    with on(x.device):
        return gradients_by_products(functools.partial(product, config=config), dy, x, w, live, side, width, of_x, of_w, column_sums)
