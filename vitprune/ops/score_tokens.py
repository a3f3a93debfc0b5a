"""DynamicViT's token predictor in inference: how likely each patch is to be kept."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..tokens import TokenPredictor
from .checks import check_tensors, fail
from .layer_norm import by_module
from .linear import linear, watched, weight_and_bias
from .registry import Backend, autocasts, call, choose, define, find, large, plain_form, serve
from .triton import triton

OP = "score_tokens"
KINDS = [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear, nn.LogSoftmax]


def score_tokens(patches: Tensor, predictor: nn.Module, mask: Tensor | None = None) -> Tensor:
    """Log-odds of being kept, which order patches as the predictor's log-probabilities do.

    patches [B, N, C]; predictor: a `TokenPredictor` of width C, or a module of your own that gives log-probabilities as it does; mask
    bool [B, N]: patches that the image still has (None: all; scores of the others mean nothing). Returns [B, N].
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    check_tensors(OP, ("mask",), patches=patches, mask=mask)
    callable(predictor) or fail(OP, "predictor", "a module", f"{predictor!r:.80}")
    shape, device, dtype = patches.shape, patches.device, patches.dtype
    layers = _layers(predictor)
    if layers is not None:
        C = layers[1].in_features
        (len(shape) == 3 and shape[-1] == C) or fail(OP, "patches", f"[B, N, {C}]", shape)
    if mask is not None:
        mask.shape == shape[:2] or fail(OP, "mask", f"[B, N] = {tuple(shape[:2])}", mask.shape)
        mask.dtype == torch.bool or fail(OP, "mask", "bool", mask.dtype)
    if layers is None:  # somebody's own, of which nothing else is known
        return call(OP, plain_form(OP, "reference"), patches, predictor, mask)
    weights = [weight_and_bias(layers[i]) for i in (0, 1, 3, 5, 7)]
    check_tensors(OP, patches=patches, predictor=weights[1][0])
    cast = autocasts(device)
    weights[1][0].dtype == dtype or cast or fail(OP, "patches", f"{weights[1][0].dtype}, as the predictor's weights", dtype)
    plain = _plain(layers, weights, dtype)
    kernel = plain and not torch.is_grad_enabled() and not cast  # no reason to fail where one is forced for the other operators
    size = large(shape[0] * shape[1]) if kernel or torch.jit.is_tracing() else None  # a trace is checked without gradients
    name = choose(OP, device, dtype, large=size) if kernel else plain_form(OP, "split" if plain else "reference")
    if find(OP, name).composite:
        return call(OP, name, patches, predictor, mask)
    return call(OP, name, patches, *weights[0], layers[0].eps, *(t for both in weights[1:] for t in both), mask)


def _layers(predictor: nn.Module) -> list[nn.Module] | None:
    """The layers of a `TokenPredictor` as it was made, called or replaced by nobody else; None of any other."""
    if getattr(type(predictor), "forward", None) is not TokenPredictor.forward:
        return None
    layers = _parts(predictor, "in_conv") + _parts(predictor, "out_conv")
    if [type(m) for m in layers] != KINDS or any(layers[i].approximate != "none" for i in (2, 4, 6)) or layers[8].dim not in (-1, 2):
        return None
    if any(watched(m) for m in (predictor, predictor.in_conv, predictor.out_conv, *layers)):
        return None
    return layers


def _plain(layers: list[nn.Module], weights: list[tuple[Tensor | None, Tensor | None]], dtype: torch.dtype) -> bool:
    """Whether weights of that dtype are all that tells these layers from any others of their width."""
    C, given = layers[1].in_features, [t for both in weights for t in both if t is not None]
    if weights[0][0] is None or any(t.dtype != dtype or type(t) not in (Tensor, nn.Parameter) for t in given):
        return False
    return [w.shape for w, _ in weights] == [(C,), (C, C), (C // 2, C), (C // 4, C // 2), (2, C // 4)]


def _parts(predictor: nn.Module, name: str) -> list[nn.Module]:
    return [*getattr(predictor, name)._modules.values()]  # an index or a slice of a Sequential takes longer than a small product


def reference(patches: Tensor, predictor: nn.Module, mask: Tensor | None) -> Tensor:
    """The definition: the two log-probabilities of the predictor, as in training."""
    logp = predictor(patches, mask)
    return logp[..., 0] - logp[..., 1]


def split(patches: Tensor, predictor: nn.Module, mask: Tensor | None) -> Tensor:
    """Without the concatenation: the shared half of its product is one vector an image, and two logits need no softmax."""
    norm, first, _ = _parts(predictor, "in_conv")
    second, _, third, _, last, _ = _parts(predictor, "out_conv")
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


def _shape_of(patches: Tensor, *_) -> Tensor:
    return patches.new_empty(patches.shape[:2])


def _macs(patches, *_) -> int:
    B, N, C = patches
    return B * (N * (C * C + C * C // 4 + C * C // 8 + C // 2) + C * C // 4)


define(OP, "(Tensor patches, Tensor norm_weight, Tensor? norm_bias, float eps, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor w3, "
       "Tensor? b3, Tensor w4, Tensor? b4, Tensor? mask, str backend) -> Tensor",
       lambda *args: find(OP, args[-1]).run(*args[:-1]), _shape_of, macs=_macs)


serve(OP, Backend("split", split, composite=True), Backend("reference", reference, composite=True), triton(OP))
