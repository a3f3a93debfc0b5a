"""DynamicViT's token predictor in inference: how likely each patch is to be kept."""
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import fail, on_device
from .layer_norm import by_module
from .linear import linear, weight_and_bias
from .registry import Backend, call, choose, serve

OP = "score_tokens"


def score_tokens(patches: Tensor, predictor: nn.Module, mask: Tensor | None = None) -> Tensor:
    """Log-odds of being kept, which order patches as the predictor's log-probabilities do.

    patches [B, N, C]; predictor: a `TokenPredictor` of width C; mask bool [B, N]: patches that the image still has (None:
    all; scores of the others mean nothing). Returns [B, N]. Raises ValueError for shapes or devices that do not fit together.
    """
    first, shape, device = _layers(predictor, "in_conv")[1], patches.shape, patches.device
    C = first.in_features
    (len(shape) == 3 and shape[-1] == C) or fail(OP, "patches", f"[B, N, {C}]", shape)
    mask is None or mask.shape == shape[:2] or fail(OP, "mask", f"[B, N] = {tuple(shape[:2])}", mask if mask is None else mask.shape)
    on_device(OP, "patches", device, mask=mask, predictor=weight_and_bias(first)[0])
    return call(OP, choose(OP, device, patches.dtype), patches, predictor, mask)


def _layers(predictor: nn.Module, name: str) -> list[nn.Module]:
    return [*getattr(predictor, name)._modules.values()]  # an index or a slice of a Sequential takes longer than a small product


def reference(patches: Tensor, predictor: nn.Module, mask: Tensor | None) -> Tensor:
    """The definition: the two log-probabilities of the predictor, as in training."""
    logp = predictor(patches, mask)
    return logp[..., 0] - logp[..., 1]


def split(patches: Tensor, predictor: nn.Module, mask: Tensor | None) -> Tensor:
    """Without the concatenation: the shared half of its product is one vector an image, and two logits need no softmax."""
    norm, first, _ = _layers(predictor, "in_conv")
    second, _, third, _, last, _ = _layers(predictor, "out_conv")
    x = linear(by_module(norm, patches), *weight_and_bias(first), gelu=True)
    local, shared = x.chunk(2, dim=-1)
    if mask is None:
        shared = shared.mean(1) if patches.shape[1] else shared.sum(1)
    else:
        weight = mask[..., None].to(x.dtype)
        shared = (shared * weight).sum(1) / weight.sum(1).clamp(min=1)
    weight, bias = weight_and_bias(second)
    w_local, w_shared = weight.chunk(2, dim=1)
    shared = F.linear(shared, w_shared, bias)
    x = F.gelu(F.linear(local, w_local) + shared[:, None])
    keep, drop = last(linear(x, *weight_and_bias(third), gelu=True)).unbind(-1)
    return keep - drop


serve(OP, Backend("split", split, composite=True), Backend("reference", reference, composite=True))
