"""Top-k token selection: the patches with the highest scores, prefix tokens protected, gathered in one step.

Source: Rao et al., DynamicViT (2021), section 3.2 (inference); here in ascending order of position, which leaves
attention unchanged and makes ties and NaN well defined.
"""
import torch
from torch import Tensor

from ..native import select_tokens as native
from .checks import check_float, check_tensors, fail, is_int
from .registry import Backend, call, choose, define, find, gradient, large, run, serve
from .triton import kernel, triton

OP = "select_tokens"


def select_tokens(x: Tensor, scores: Tensor, k: int, *, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Keep the prefix tokens and the k patches with the highest scores.

    x [B, P+N, C], any strides; scores [B, N]; P = prefix. Returns tokens [B, P+k, C] and the kept ids [B, k],
    int64 in 0..N-1, ascending. Ties go to the lower index; NaN ranks below everything. The gradient reaches x only.
    Raises ValueError for shapes that do not fit together and for k outside 0..N.
    """
    check_tensors(OP, x=x, scores=scores)
    check_selection(OP, x, scores, k, prefix)
    N = scores.shape[1]
    many = True if N > 4096 else False  # a branch on the size, not the size: what a graph chooses by must be constant
    return call(OP, choose(OP, x.device, x.dtype, scores=scores.dtype, many=many, large=large(scores.numel())), x, scores, k, prefix)


def check_selection(op: str, x: Tensor, scores: Tensor, k: int, prefix: int) -> None:
    """Raise ValueError where shapes and dtypes do not fit together or k is not in 0..N."""
    x.dim() == 3 or fail(op, "x", "[B, P+N, C]", x.shape)
    check_float(op, x=x, scores=scores)
    (is_int(prefix) and 0 <= prefix <= x.shape[1]) or fail(op, "prefix", f"an int in 0..{x.shape[1]}, the number of tokens", repr(prefix))
    N = x.shape[1] - prefix
    scores.shape == (x.shape[0], N) or fail(op, "scores", f"[B, N] = {(x.shape[0], N)}", scores.shape)
    (is_int(k) and 0 <= k <= N) or fail(op, "k", f"an int in 0..{N}", repr(k))


def reference(x: Tensor, scores: Tensor, k: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The definition: a stable sort of the negated scores puts ties in order and NaN last (GPUs put NaN with a sign first)."""
    scores = scores.detach()
    ids = torch.where(scores.isnan(), torch.nan, 0.0 - scores).sort(dim=1, stable=True).indices[:, :k].sort(dim=1).values
    return _gather(x, ids, prefix), ids


def _gather(x: Tensor, ids: Tensor, prefix: int) -> Tensor:
    B, N, C = x.shape
    rows = torch.arange(B, device=x.device)[:, None] * N + prefix + ids
    patches = x.reshape(B * N, C).index_select(0, rows.reshape(-1)).view(B, ids.shape[1], C)
    return torch.cat([x[:, :prefix], patches], dim=1)


def _forward(x, scores, k: int, prefix: int, backend: str) -> tuple[Tensor, Tensor]:
    return find(OP, backend).run(x, scores, k, prefix)


def _setup(ctx, inputs, output) -> None:
    x, _, _, ctx.prefix, ctx.backend = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dtokens, _):
    ids, = ctx.saved_tensors
    if ctx.backend == "triton":
        return run(OP + "_backward", dtokens, ids, ctx.prefix, ctx.shape[1]), None, None, None, None
    B, _, C = ctx.shape
    index = torch.cat([torch.arange(ctx.prefix, device=ids.device).expand(B, -1), ids + ctx.prefix], dim=1)
    dx = dtokens.new_zeros(ctx.shape).scatter(1, index[:, :, None].expand(-1, -1, C), dtokens)
    return dx, None, None, None, None


define(OP, "(Tensor x, Tensor scores, int k, int prefix, str backend) -> (Tensor, Tensor)", _forward,
       lambda x, scores, k, prefix, backend: (x.new_empty(x.shape[0], prefix + k, x.shape[2]),
                                              x.new_empty((x.shape[0], k), dtype=torch.int64)),
       macs=lambda *_: 0)
define(OP + "_backward", "(Tensor dtokens, Tensor ids, int prefix, SymInt tokens) -> Tensor",
       lambda *args: kernel(OP).launch_backward(*args),
       lambda dtokens, ids, prefix, tokens: dtokens.new_empty(dtokens.shape[0], tokens, dtokens.shape[2]), macs=lambda *_: 0)
gradient(OP, _gradient, _setup)


# C++ is the fastest measured on CPUs, CUDA C++ on an H200.
serve(OP, Backend("cpp", native.cpp, refuses=native.refuses_cpp), Backend("cuda", native.cuda, refuses=native.refuses_cuda),
      triton(OP), Backend("reference", reference, composite=True))
