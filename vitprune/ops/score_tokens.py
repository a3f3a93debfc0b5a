"""DynamicViT's token predictor in inference: how likely each patch is to be kept."""
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import fail, on_device
from .layer_norm import by_module
from .linear import linear
from .registry import Backend, call, choose, serve

OP = "score_tokens"


def score_tokens(patches: Tensor, predictor: nn.Module, mask: Tensor | None = None) -> Tensor:
    """Log-odds of being kept, which order patches as the predictor's log-probabilities do.

    patches [B, N, C]; predictor: a `TokenPredictor` of width C; mask bool [B, N]: patches that the image still has (None:
    all; scores of the others mean nothing). Returns [B, N]. Raises ValueError for shapes or devices that do not fit together.
    """
    first = predictor.in_conv[1]
    C = first.in_features
    (patches.dim() == 3 and patches.shape[-1] == C) or fail(OP, "patches", f"[B, N, {C}]", patches.shape)
    expected = patches.shape[:2]
    mask is None or mask.shape == expected or fail(OP, "mask", f"[B, N] = {tuple(expected)}", mask if mask is None else mask.shape)
    on_device(OP, "patches", patches.device, mask=mask, predictor=first.weight)
    return call(OP, choose(OP, patches.device, patches.dtype), patches, predictor, mask)


def reference(patches: Tensor, predictor: nn.Module, mask: Tensor | None) -> Tensor:
    """The definition: the two log-probabilities of the predictor, as in training."""
    logp = predictor(patches, mask)
    return logp[..., 0] - logp[..., 1]


def split(patches: Tensor, predictor: nn.Module, mask: Tensor | None) -> Tensor:
    """Without the concatenation: the shared half of its product is one vector an image, and two logits need no softmax."""
    norm, first, _ = predictor.in_conv  # no slices: each would be a new module
    second, _, third, _, last, _ = predictor.out_conv
    x = linear(by_module(norm, patches), first.weight, first.bias, gelu=True)
    local, shared = x.chunk(2, dim=-1)
    if mask is None:
        shared = shared.mean(1) if patches.shape[1] else shared.sum(1)
    else:
        weight = mask[..., None].to(x.dtype)
        shared = (shared * weight).sum(1) / weight.sum(1).clamp(min=1)
    w_local, w_shared = second.weight.chunk(2, dim=1)
    shared = F.linear(shared, w_shared, second.bias)
    x = F.gelu(F.linear(local, w_local) + shared[:, None])
    logits = last(linear(x, third.weight, third.bias, gelu=True))
    return logits[..., 0] - logits[..., 1]


serve(OP, Backend("split", split, composite=True), Backend("reference", reference, composite=True))
