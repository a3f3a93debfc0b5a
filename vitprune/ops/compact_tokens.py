"""Compaction for adaptive token counts: [B, N, C] with a keep mask <-> packed rows with cu_seqlens."""
import torch
from torch import Tensor

from ..native import compact_tokens as native
from .checks import check_tensors, fail, is_int, is_number, values
from .registry import Backend, call, choose, define, find, gradient, large, run, serve
from .triton import triton

OP, INVERSE = "compact_tokens", "expand_rows"


def compact_tokens(x: Tensor, keep: Tensor, *, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """Pack the kept tokens of a batch into consecutive rows.

    x [B, N, C]; keep bool [B, N]. Returns rows [R, C] and cu_seqlens [B+1] int32: image b owns rows
    cu_seqlens[b]:cu_seqlens[b+1]; rows past cu_seqlens[-1] are zero. R = capacity; without one, the exact count on a
    CPU in eager mode and B*N elsewhere, so that nothing waits for the device.
    Raises ValueError for shapes that do not fit; more kept tokens than capacity raise RuntimeError (on a GPU: later).
    """
    check_tensors(OP, x=x, keep=keep)
    x.dim() == 3 or fail(OP, "x", "[B, N, C]", x.shape)
    keep.dtype == torch.bool or fail(OP, "keep", "bool", keep.dtype)
    keep.shape == x.shape[:2] or fail(OP, "keep", f"[B, N] = {tuple(x.shape[:2])}", keep.shape)
    capacity is None or (is_int(capacity) and capacity >= 0) or fail(OP, "capacity", "an int >= 0", repr(capacity))
    if capacity is None:
        static = x.device.type != "cpu" or torch.compiler.is_compiling()
        capacity = keep.numel() if static else int(keep.sum())
    return call(OP, choose(OP, x.device, x.dtype, large=large(keep.numel())), x, keep, capacity)


def expand_rows(rows: Tensor, cu_seqlens: Tensor, keep: Tensor, *, fill: float = 0.0) -> Tensor:
    """The inverse of `compact_tokens`: rows [R, C], cu_seqlens [B+1] int32 or int64, keep bool [B, N] -> [B, N, C], dropped tokens = fill.

    Raises ValueError for shapes or devices that do not fit together, and on a CPU for cu_seqlens that are not those of keep.
    """
    check_tensors(INVERSE, rows=rows, cu_seqlens=cu_seqlens, keep=keep)
    rows.dim() == 2 or fail(INVERSE, "rows", "[R, C]", rows.shape)
    (keep.dim() == 2 and keep.dtype == torch.bool) or fail(INVERSE, "keep", "bool [B, N]", f"{keep.dtype} {tuple(keep.shape)}")
    cu_seqlens.shape == (keep.shape[0] + 1,) or fail(INVERSE, "cu_seqlens", f"[B+1] = {(keep.shape[0] + 1,)}", cu_seqlens.shape)
    cu_seqlens.dtype in (torch.int32, torch.int64) or fail(INVERSE, "cu_seqlens", "int32 or int64", cu_seqlens.dtype)
    is_number(fill) or isinstance(fill, bool) or fail(INVERSE, "fill", "a number", repr(fill))
    rows.dtype.is_floating_point or _holds(rows.dtype, fill) or fail(INVERSE, "fill", f"one of {rows.dtype}, as rows", fill)
    if (ends := values(cu_seqlens)) is not None:
        counted = _sequence_starts(keep).tolist()
        ends == counted or fail(INVERSE, "cu_seqlens", f"keep's counts, summed, {str(counted):.100}", f"{str(ends):.100}")
        ends[-1] <= rows.shape[0] or fail(INVERSE, "rows", f"[R, C] with R >= cu_seqlens[-1] = {ends[-1]}", rows.shape)
    return call(INVERSE, choose(INVERSE, rows.device, rows.dtype, large=large(keep.numel())), rows, cu_seqlens, keep, fill)


def _holds(dtype: torch.dtype, value: float) -> bool:
    """Whether an integer or boolean dtype has that number."""
    least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return least <= value <= most and value == int(value)


def _sequence_starts(keep: Tensor) -> Tensor:
    return torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def reference(x: Tensor, keep: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The definition: a stable sort of the mask brings kept tokens forward in order."""
    B, N, C = x.shape
    cu_seqlens = _sequence_starts(keep)
    number = "" if torch.compiler.is_compiling() else f" {capacity}"  # a graph that names it is for that capacity alone
    torch._assert_async((cu_seqlens[-1] <= capacity), f"compact_tokens: more tokens kept than capacity{number}")
    source = (~keep.reshape(-1)).to(torch.uint8).sort(stable=True).indices[:capacity]
    rows = x.reshape(B * N, C).index_select(0, source)
    live = torch.arange(source.numel(), device=x.device) < cu_seqlens[-1]
    rows = torch.where(live[:, None], rows, 0)
    return torch.nn.functional.pad(rows, (0, 0, 0, capacity - source.numel())), cu_seqlens


def expand_reference(rows: Tensor, cu_seqlens: Tensor, keep: Tensor, fill: float) -> Tensor:
    """The definition of the inverse: every kept token's row is the number of kept tokens before it."""
    position = (keep.reshape(-1).cumsum(0) - 1).clamp(min=0)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))  # so that there is a row to point at when none is kept
    out = rows.index_select(0, position.clamp(max=rows.shape[0] - 1)).view(*keep.shape, rows.shape[1])
    return torch.where(keep[..., None], out, torch.full((), fill, dtype=rows.dtype, device=rows.device))


def _setup(ctx, inputs, output) -> None:
    keep, ctx.backend = inputs[1], inputs[-1]
    ctx.save_for_backward(keep, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, drows, _):
    keep, cu_seqlens = ctx.saved_tensors
    return run("expand_rows", drows, cu_seqlens, keep, 0.0, ctx.backend), None, None, None


def _expand_setup(ctx, inputs, output) -> None:
    rows, _, keep, _, ctx.backend = inputs
    ctx.capacity = rows.shape[0]
    ctx.save_for_backward(keep)


def _expand_gradient(ctx, dout):
    keep, = ctx.saved_tensors
    return run("compact_tokens", dout, keep, ctx.capacity, ctx.backend)[0], None, None, None, None


define(OP, "(Tensor x, Tensor keep, SymInt capacity, str backend) -> (Tensor, Tensor)",
       lambda x, keep, capacity, backend: find(OP, backend).run(x, keep, capacity),
       lambda x, keep, capacity, backend: (x.new_empty(capacity, x.shape[2]),
                                           x.new_empty(x.shape[0] + 1, dtype=torch.int32)), macs=lambda *_: 0)
define(INVERSE, "(Tensor rows, Tensor cu_seqlens, Tensor keep, float fill, str backend) -> Tensor",
       lambda rows, cu_seqlens, keep, fill, backend: find(INVERSE, backend).run(rows, cu_seqlens, keep, fill),
       lambda rows, cu_seqlens, keep, fill, backend: rows.new_empty(*keep.shape, rows.shape[1]), macs=lambda *_: 0)
gradient(OP, _gradient, _setup)
gradient(INVERSE, _expand_gradient, _expand_setup)


# One launch instead of many: on an H200 1.9 to 2.8 and 1.2 to 1.6 times as fast as PyTorch's best on the GPU alone.
serve(OP, Backend("cuda", native.cuda, refuses=native.refuses), triton(OP), Backend("reference", reference, composite=True))
serve(INVERSE, Backend("cuda", native.expand_cuda, refuses=native.refuses),
      triton(OP, "launch_expand"), Backend("reference", expand_reference, composite=True))
