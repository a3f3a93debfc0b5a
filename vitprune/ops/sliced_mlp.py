"""The head-sliced fused MLP's other half: fc1, GELU and fc2 over the live hidden blocks only, from the full weights."""
import functools
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..native import sliced_product as native
from .checks import check_float, check_tensors, fail, is_int
from .registry import Backend, autocasts, call, choose, define, find, gradient, large, run, serve
from .sliced_linear import as_rows, check_live, gather, one_dtype, spread
from .triton import kernel, triton

OP = "sliced_mlp"


def sliced_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, live: Tensor | None, *,
               width: int = 64, residual: Tensor | None = None) -> Tensor:
    """residual + fc2(gelu(fc1(x))) over the live blocks of hidden units; GELU is exact (erf).

    x, residual [..., C]; w1 [F, C], b1 [F], w2 [C, F], b2 [C]; live int32 [L]: ids of live `width`-wide hidden blocks,
    each once (the length is known on the host), or None: every unit. b1, b2 and residual may be None. Returns [..., C].
    Gradients of dead units are exactly zero: how a dead block can come back says `sliced_linear`.
    Raises ValueError for arguments that do not fit together.
    """
    check_tensors(OP, ("b1", "b2", "live", "residual"), x=x, w1=w1, b1=b1, w2=w2, b2=b2, live=live, residual=residual)
    w1.dim() == 2 or fail(OP, "w1", "[F, C]", w1.shape)
    hidden, C = w1.shape
    (x.dim() > 0 and x.shape[-1] == C) or fail(OP, "x", f"[..., {C}]", x.shape)
    (w2.dim() == 2 and w2.shape[1] == hidden) or fail(OP, "w2", f"[C, F] with F = {hidden}", w2.shape)
    for name, t, n in (("b1", b1, hidden), ("b2", b2, w2.shape[0])):
        t is None or t.shape == (n,) or fail(OP, name, f"[{n}]", t.shape)
    (is_int(width) and width > 0 and (live is None or hidden % width == 0)) or fail(
        OP, "width", "a positive int" + (f" that divides F = {hidden}" if live is not None else ""), repr(width))
    facts = {"width": width, "large": large(prod(x.shape[:-1]))}
    if live is None:
        facts |= {"width": 64, "dense": True}
    else:
        check_live(OP, live, hidden // width)
    out = (*x.shape[:-1], w2.shape[0])
    residual is None or residual.shape == out or fail(OP, "residual", f"{out}", residual.shape)
    check_float(OP, x=x, w1=w1, b1=b1, w2=w2, b2=b2, residual=residual)
    autocasts(x.device) or one_dtype(OP, x, w1=w1, b1=b1, w2=w2, b2=b2)
    name = choose(OP, x.device, x.dtype, **facts)
    if residual is not None and (autocasts(x.device) or residual.dtype != x.dtype):  # it keeps its precision
        return residual + call(OP, name, x, w1, b1, w2, b2, live, None, width)
    return call(OP, name, x, w1, b1, w2, b2, live, residual, width)


def reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, live: Tensor | None,
              residual: Tensor | None, width: int) -> Tensor:
    """The definition: gather the live weights, then the dense layers; where all are alive there is nothing to gather, in any order."""
    if live is not None and live.shape[0] * width < w1.shape[0]:
        w1, b1, w2 = gather(w1, 0, live, width), gather(b1, 0, live, width), gather(w2, 1, live, width)
    y = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    return y if residual is None else residual + y


def by_products(product, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, live: Tensor | None,
                residual: Tensor | None, width: int) -> Tensor:
    """`sliced_mlp` by a kernel's `product` (see vitprune.native.sliced_product)."""
    one_dtype(OP, x, w1=w1, b1=b1, w2=w2, b2=b2)
    flat, (live, b1, b2) = as_rows(x), (t if t is None else t.contiguous() for t in (live, b1, b2))
    hidden = torch.empty(len(flat), native.units(w1.shape[0], live, width), dtype=x.dtype, device=x.device)
    y = torch.empty(len(flat), w2.shape[0], dtype=x.dtype, device=x.device)
    product(flat, w1.t(), hidden, live, width, live_columns=True, bias=b1, epilogue="gelu")
    product(hidden, w2.t(), y, live, width, live_depth=True, bias=b2, other=residual if residual is None else as_rows(residual))
    return y.view(*x.shape[:-1], y.shape[1])


def gradients_by_products(product, dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, live: Tensor | None,
                          width: int, of_x: bool, of_w: bool,
                          sums=lambda t: t.sum(0)) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and b2; of dead units zero, and never computed. The hidden layer is computed again. sums: of columns."""
    flat, dy, live = as_rows(x), as_rows(dy), live if live is None else live.contiguous()
    hidden, dh = (torch.empty(len(flat), native.units(w1.shape[0], live, width), dtype=x.dtype, device=x.device) for _ in range(2))
    dx, dw1, db1, dw2, db2 = (t.new_empty(0) for t in (x, w1, w1, w2, w2))
    product(flat, w1.t(), hidden, live, width, live_columns=True, bias=b1 if b1 is None else b1.contiguous())
    product(dy, w2, dh, live, width, live_columns=True, other=hidden, epilogue="gelu gradient")  # hidden: now after the GELU
    if of_x:
        dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        product(dh, w1, dx, live, width, live_depth=True)
        dx = dx.view(x.shape)
    if of_w:
        dw1, dw2, db2 = torch.zeros_like(w1), torch.zeros_like(w2), sums(dy).to(w2.dtype)
        product(dh.t(), flat, dw1, live, width, live_rows=True)
        product(dy.t(), hidden, dw2, live, width, full_columns=True)
        db1 = spread(w1.new_empty(w1.shape[0]), 0, live, width, sums(dh))
    return dx, dw1, db1, dw2, db2


def _backward(dy, x, w1, b1, w2, live, width: int, of_x: bool, of_w: bool,
              backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, db1, dw2, db2; dead units are zero; empty where not asked for: of_x, of_w (of weights and biases). The hidden layer is
    recomputed rather than stored."""
    if backend == "triton":
        return kernel(OP).launch_backward(dy, x, w1, b1, w2, live, width, of_x, of_w)
    if backend == "cuda":
        return gradients_by_products(native.product, dy, x, w1, b1, w2, live, width, of_x, of_w)
    rows, dy = as_rows(x), as_rows(dy)
    w1_live, w2_live = gather(w1, 0, live, width), gather(w2, 1, live, width)
    h = F.linear(rows, w1_live, gather(b1, 0, live, width))
    dh = torch.ops.aten.gelu_backward(dy @ w2_live, h)
    dx = (dh @ w1_live).view(x.shape) if of_x else x.new_empty(0)
    if not of_w:
        return dx, *(t.new_empty(0) for t in (w1, w1, w2, w2))
    return (dx, spread(w1, 0, live, width, dh.t() @ rows), spread(w1.new_empty(w1.shape[0]), 0, live, width, dh.sum(0)),
            spread(w2, 1, live, width, dy.t() @ F.gelu(h)), dy.sum(0))


def _setup(ctx, inputs, output) -> None:
    x, w1, b1, w2, _, live, _, ctx.width, ctx.backend = inputs
    ctx.save_for_backward(x, w1, b1, w2, live)


def _gradient(ctx, dy):
    x, w1, b1, w2, live = ctx.saved_tensors
    of_x, *of_w = ctx.needs_input_grad[:5]
    found = [None] * 5
    if of_x or any(of_w):
        found = run(OP + "_backward", dy, x, w1, b1, w2, live, ctx.width, of_x, any(of_w), ctx.backend)
    found = [t if wanted else None for t, wanted in zip(found, ctx.needs_input_grad)]
    return *found, None, dy if ctx.needs_input_grad[6] else None, None, None


def _macs(x, w1, b1, w2, b2, live, residual, width, *_) -> int:
    rows = 1
    for n in x[:-1]:
        rows *= n
    return rows * (w1[0] if live is None else live[0] * width) * (w1[1] + w2[0])


define(OP, "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? live, Tensor? residual, int width, str backend) -> Tensor",
       lambda x, w1, b1, w2, b2, live, residual, width, backend: find(OP, backend).run(x, w1, b1, w2, b2, live, residual, width),
       lambda x, w1, b1, w2, b2, live, residual, width, backend: x.new_empty(*x.shape[:-1], w2.shape[0]),
       cast=("x", "w1", "b1", "w2", "b2", "residual"), macs=_macs)
define(OP + "_backward", "(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? live, int width, bool of_x, bool of_w, "
       "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _backward,
       lambda dy, x, w1, b1, w2, live, width, of_x, of_w, backend: (
           x.new_empty(x.shape if of_x else 0), *((torch.empty_like(w1), w1.new_empty(w1.shape[0]), torch.empty_like(w2),
                                                   w2.new_empty(w2.shape[0])) if of_w else (t.new_empty(0) for t in (w1, w1, w2, w2)))),
       macs=lambda dy, x, w1, b1, w2, live, width, of_x, of_w, *_: (
           (2 + of_x + 2 * of_w) * _macs(x, w1, None, w2, None, live, None, width) // 2))
gradient(OP, _gradient, _setup)


# Where no file says what was measured, the library over gathered weights: on an H200 the fastest in large eager calls and with a gradient.
serve(OP, Backend("reference", reference, composite=True), triton(OP),
      Backend("cuda", functools.partial(by_products, native.product), refuses=native.refuses))
