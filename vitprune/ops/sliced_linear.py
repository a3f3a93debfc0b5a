"""A linear layer over the live blocks of its inputs or outputs only, read from the full weights."""
import functools
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..native import sliced_product as native
from .checks import check_float, check_tensors, fail, is_int, values
from .registry import Backend, autocasts, call, choose, define, find, gradient, large, run, serve
from .triton import kernel, triton

OP = "sliced_linear"


def sliced_linear(x: Tensor, w: Tensor, b: Tensor | None, live: Tensor, *, side: str, width: int = 64) -> Tensor:
    """A linear layer of which only some blocks of `width` rows (outputs) or columns (inputs) are live.

    side="out": x [..., I], w [O, I], b [O] -> [..., L*width], the live outputs only.
    side="in":  x [..., L*width], the live inputs only, w [O, I], b [O] -> [..., O].
    live: int32 [L], ids of live blocks, each once (the length is known on the host). b may be None.
    Gradients of dead weights are exactly zero: what is dead here stays dead. While blocks are still being chosen,
    `vitprune.learned` computes all of them behind gates, whose gradient sums dL/dW * W over a block, closed ones too, so that
    a dead block's score can bring it back. Raises ValueError for arguments that do not fit together.
    """
    side in ("in", "out") or fail(OP, "side", "'in' or 'out'", repr(side))
    check_tensors(OP, ("b",), x=x, w=w, b=b, live=live)
    w.dim() == 2 or fail(OP, "w", "[O, I]", w.shape)
    sliced = w.shape[0 if side == "out" else 1]
    (is_int(width) and width > 0 and sliced % width == 0) or fail(OP, "width", f"a positive int that divides {sliced}", repr(width))
    check_live(OP, live, sliced // width)
    inputs = w.shape[1] if side == "out" else live.shape[0] * width
    (x.dim() > 0 and x.shape[-1] == inputs) or fail(OP, "x", f"[..., {inputs}]", x.shape)
    b is None or b.shape == w.shape[:1] or fail(OP, "b", f"[O] = {tuple(w.shape[:1])}", b.shape)
    check_float(OP, x=x, w=w, b=b)
    autocasts(x.device) or one_dtype(OP, x, w=w, b=b)
    return call(OP, choose(OP, x.device, x.dtype, width=width, large=large(prod(x.shape[:-1]))), x, w, b, live, side, width)


def check_live(op: str, live: Tensor, blocks: int) -> None:
    """live must be int32 [L], ids of blocks, each once; the ids are looked at on a CPU only, since nothing waits for a GPU."""
    (live.dim() == 1 and live.dtype == torch.int32) or fail(op, "live", "int32 [L]", f"{live.dtype} {tuple(live.shape)}")
    live.shape[0] <= blocks or fail(op, "live", f"at most {blocks} block ids", live.shape[0])
    if ids := values(live):
        (len({*ids}) == len(ids) and min(ids) >= 0 and max(ids) < blocks) or fail(op, "live", f"ids in 0..{blocks - 1}, each once",
            f"{ids!s:.100}")


def block_index(live: Tensor, width: int) -> Tensor:
    """Ids of live blocks [L] -> ids of their units [L*width], int64."""
    return (live.long()[:, None] * width + torch.arange(width, device=live.device)).flatten()


def gather(w: Tensor | None, dim: int, live: Tensor | None, width: int) -> Tensor | None:
    """The live blocks of w along dim, side by side; in one call, since on a GPU those that list units take longer than the copy."""
    if w is None or live is None:
        return w
    return w.unflatten(dim, (w.shape[dim] // width, width)).index_select(dim, live).flatten(dim, dim + 1)


def spread(like: Tensor, dim: int, live: Tensor | None, width: int, values: Tensor) -> Tensor:
    """The inverse of `gather`: zeros like `like` but for the live blocks along dim, which are the values."""
    if live is None:
        return torch.empty_like(like).copy_(values)
    full = torch.zeros_like(like)
    blocks = values.unflatten(dim, (live.shape[0], width)).to(like.dtype)
    full.unflatten(dim, (like.shape[dim] // width, width)).index_copy_(dim, live.long(), blocks)
    return full


def reference(x: Tensor, w: Tensor, b: Tensor | None, live: Tensor, side: str, width: int) -> Tensor:
    """The definition: gather the live weights, then the dense layer."""
    if side == "in":
        return F.linear(x, gather(w, 1, live, width), b)
    return F.linear(x, gather(w, 0, live, width), gather(b, 0, live, width))


def by_products(product, x: Tensor, w: Tensor, b: Tensor | None, live: Tensor, side: str, width: int) -> Tensor:
    """`sliced_linear` by a kernel's `product` (see vitprune.native.sliced_product)."""
    one_dtype(OP, x, w=w, b=b)
    flat, out = as_rows(x), side == "out"
    y = torch.empty(len(flat), len(live) * width if out else w.shape[0], dtype=x.dtype, device=x.device)
    product(flat, w.t(), y, live.contiguous(), width, live_columns=out, live_depth=not out, bias=b if b is None else b.contiguous())
    return y.view(*x.shape[:-1], y.shape[1])


def gradients_by_products(product, dy: Tensor, x: Tensor, w: Tensor, live: Tensor, side: str, width: int, of_x: bool, of_w: bool,
                          sums=lambda t: t.sum(0)) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and b; of dead blocks zero, and never computed. sums: of columns."""
    flat, dy, out, live = as_rows(x), as_rows(dy), side == "out", live.contiguous()
    dx, dw, db = (t.new_empty(0) for t in (x, w, w))
    if of_x:
        dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        product(dy, w, dx, live, width, live_columns=not out, live_depth=out)
        dx = dx.view(x.shape)
    if of_w:
        dw, db = torch.zeros_like(w), sums(dy).to(w.dtype)
        product(dy.t(), flat, dw, live, width, live_rows=out, full_columns=not out)
        db = spread(w.new_empty(w.shape[0]), 0, live, width, db) if out else db
    return dx, dw, db


def as_rows(t: Tensor) -> Tensor:
    """[..., C] -> [M, C], a copy only where the rows do not lie evenly."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def one_dtype(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Kernels take one kind of numbers, as PyTorch's linear layers do."""
    for name, t in tensors.items():
        t is None or t.dtype == x.dtype or fail(op, name, f"{x.dtype} as x", t.dtype)


def _backward(dy, x, w, live, side: str, width: int, of_x: bool, of_w: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, db; dead blocks of dw and db are zero; empty where not asked for: of_x, of_w (and the bias)."""
    if backend == "triton":
        return kernel(OP).launch_backward(dy, x, w, live, side, width, of_x, of_w)
    if backend == "cuda":
        return gradients_by_products(native.product, dy, x, w, live, side, width, of_x, of_w)
    dim, flat_y, flat_x = 1 if side == "in" else 0, as_rows(dy), as_rows(x)
    dx, dw, db = (t.new_empty(0) for t in (x, w, w))
    if of_x:
        dx = (flat_y @ gather(w, dim, live, width)).view(x.shape)
    if of_w:
        dw, db = spread(w, dim, live, width, flat_y.t() @ flat_x), flat_y.sum(0).to(w.dtype)
        db = spread(w.new_empty(w.shape[0]), 0, live, width, db) if side == "out" else db
    return dx, dw, db


def _setup(ctx, inputs, output) -> None:
    x, w, _, live, ctx.side, ctx.width, ctx.backend = inputs
    ctx.save_for_backward(x, w, live)


def _gradient(ctx, dy):
    of_x, of_w, of_b = ctx.needs_input_grad[:3]
    dx, dw, db = run(OP + "_backward", dy, *ctx.saved_tensors, ctx.side, ctx.width, of_x, of_w or of_b, ctx.backend)
    return dx if of_x else None, dw if of_w else None, db if of_b else None, None, None, None, None


def _fake(x, w, b, live, side, width, backend):
    return x.new_empty(*x.shape[:-1], w.shape[0] if side == "in" else live.shape[0] * width)


def _macs(x, w, b, live, side, width, *_) -> int:
    rows = 1
    for n in x[:-1]:
        rows *= n
    return rows * live[0] * width * w[0 if side == "in" else 1]


define(OP, "(Tensor x, Tensor w, Tensor? b, Tensor live, str side, int width, str backend) -> Tensor",
       lambda x, w, b, live, side, width, backend: find(OP, backend).run(x, w, b, live, side, width), _fake, cast=("x", "w", "b"),
       macs=_macs)
define(OP + "_backward", "(Tensor dy, Tensor x, Tensor w, Tensor live, str side, int width, bool of_x, bool of_w, str backend) "
       "-> (Tensor, Tensor, Tensor)", _backward,
       lambda dy, x, w, live, side, width, of_x, of_w, backend: (
           x.new_empty(x.shape if of_x else 0),
           *((torch.empty_like(w), w.new_empty(w.shape[0])) if of_w else (w.new_empty(0) for _ in range(2)))),
       macs=lambda dy, x, w, live, side, width, of_x, of_w, *_: (of_x + of_w) * _macs(x, w, None, live, side, width))
gradient(OP, _gradient, _setup)


# Where no file says what was measured, the library over gathered weights: on an H200 the fastest in large eager calls.
serve(OP, Backend("reference", reference, composite=True), triton(OP),
      Backend("cuda", functools.partial(by_products, native.product), refuses=native.refuses))
