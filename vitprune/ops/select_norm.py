"""Top-k token selection and the LayerNorm that follows it, forward."""
import torch
from torch import Tensor

from .checks import check_tensors
from .layer_norm import check_vectors, layer_norm
from .registry import Backend, autocasts, call, choose, define, find, large, serve
from .select_tokens import check_selection, select_tokens
from .triton import triton

OP = "select_norm"


def select_norm(x: Tensor, scores: Tensor, k: int, weight: Tensor, bias: Tensor | None, eps: float, *,
                prefix: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`select_tokens` and `layer_norm` of the tokens that are kept.

    x [B, P+N, C]; scores [B, N]; P = prefix; weight and bias [C], bias may be None. Returns tokens [B, P+k, C], the kept ids [B, k], int64
    in 0..N-1, ascending, and the normalised tokens [B, P+k, C]. Raises ValueError as those two do.
    """
    check_tensors(OP, ("bias",), x=x, scores=scores, weight=weight, bias=bias)
    check_selection(OP, x, scores, k, prefix)
    check_vectors(OP, x, weight, bias, eps)
    facts = {"scores": scores.dtype, "many": True if scores.shape[1] > 4096 else False, "weight": weight.dtype,
             "wide": True if x.shape[2] > 4096 else False, "large": large(scores.numel())}
    if autocasts(x.device):
        facts["autocast"] = True
    return call(OP, choose(OP, x.device, x.dtype, **facts), x, scores, k, weight, bias, eps, prefix)


def reference(x: Tensor, scores: Tensor, k: int, weight: Tensor, bias: Tensor | None, eps: float, prefix: int):
    """The definition; each half by the backend that serves it."""
    tokens, ids = select_tokens(x, scores, k, prefix=prefix)
    return tokens, ids, layer_norm(tokens, weight, bias, eps)


def _fake(x, scores, k, weight, bias, eps, prefix, backend):
    tokens = x.new_empty(x.shape[0], prefix + k, x.shape[2])
    return tokens, x.new_empty((x.shape[0], k), dtype=torch.int64), torch.empty_like(tokens)


define(OP, "(Tensor x, Tensor scores, int k, Tensor weight, Tensor? bias, float eps, int prefix, str backend) -> (Tensor, Tensor, Tensor)",
       lambda x, scores, k, weight, bias, eps, prefix, backend: find(OP, backend).run(x, scores, k, weight, bias, eps, prefix),
       _fake, macs=lambda *_: 0)


# Two launches serve where nobody has measured one.
serve(OP, Backend("reference", reference, composite=True), triton(OP))
