"""From a timm vision transformer to a pruned one, and from that to one whose dead parts are physically gone."""
import copy

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer
from torch import Tensor, nn

from . import learned
from .blocks import BlockPruning
from .layers import PrunedAttention, PrunedBlock, PrunedMlp, adopt
from .ops.sliced_linear import block_index
from .tokens import TokenPruning
from .vit import PrunedDistilledViT, PrunedViT, check_pool

_PRUNED = {VisionTransformer: PrunedViT, VisionTransformerDistilled: PrunedDistilledViT}


def prune(model: nn.Module, tokens: TokenPruning | None = None, blocks: BlockPruning | None = None) -> PrunedViT:
    """A new, pruned model from a timm vision transformer or from an already pruned one; the argument is untouched.

    Parameter names stay timm's, so that checkpoints load; token predictors are `score_predictor.{stage}` in DynamicViT's
    layout. In evaluation tokens really leave; in training a straight-through policy masks them. Blocks are chosen at once.
    A model whose blocks are masked is compacted before its blocks are pruned again. Raises TypeError for a model of another
    kind, ValueError for a part or a combination that is not supported.
    """
    if tokens is None and blocks is None:
        raise ValueError("prune: tokens or blocks must be given, got neither")
    for name, value, cls in (("tokens", tokens, TokenPruning), ("blocks", blocks, BlockPruning)):
        if value is not None and not isinstance(value, cls):
            raise TypeError(f"prune: {name} must be a {cls.__name__}, got {type(value).__name__}")
    _check(model, tokens)
    if blocks is not None and (getattr(model, "learning", None) is not None or is_masked(model)):
        raise ValueError("prune: blocks must be None for a model whose blocks are masked or being learned, which would all come back: "
                         "compact it first (vitprune.compact), or prune the dense model")
    new = copy.deepcopy(model)
    if type(new) in _PRUNED:
        try:
            new = adopt(_PRUNED[type(new)], new)
        except ValueError as error:
            raise ValueError(f"prune: the blocks of {type(model).__name__} cannot be pruned: {error}") from error
    if tokens is not None:
        new._set_tokens(tokens)
    if blocks is not None:
        blocks.apply(new)
    if new.tokens is not None and new.tokens.score == "cls_attention":
        for i in new.tokens.at:
            if new.blocks[i - 1].attn.live_heads == 0:
                raise ValueError(f"prune: blocks must keep a head in block {i - 1}, whose class attention scores the tokens")
    return new


def is_masked(model: nn.Module) -> bool:
    """Whether some of its heads, their dimensions or hidden units are dead but still there."""
    return any(m.live is not None or getattr(m, "dims", None) is not None for m in model.modules()
               if isinstance(m, (PrunedAttention, PrunedMlp)))


def _check(model: nn.Module, tokens: TokenPruning | None) -> None:
    supported = (*_PRUNED, *_PRUNED.values())
    if type(model) not in supported:
        raise TypeError("prune: model must be a timm VisionTransformer or VisionTransformerDistilled, "
                        f"got {type(model).__module__}.{type(model).__qualname__}")
    for i, block in enumerate(model.blocks):
        for name, part, known in (("", block, (Block, PrunedBlock)), (".attn", getattr(block, "attn", None), (Attention, PrunedAttention)),
                                  (".mlp", getattr(block, "mlp", None), (Mlp, PrunedMlp))):
            if type(part) not in known:
                raise ValueError(f"prune: blocks.{i}{name} must be timm's {known[0].__name__}, got {type(part).__name__}")
    if tokens is None:
        return
    if tokens.at[-1] >= len(model.blocks):
        stage = next(s for s, i in enumerate(tokens.at) if i >= len(model.blocks))
        raise ValueError(f"prune: at of stage {stage} must be a block in 0..{len(model.blocks) - 1}, got {tokens.at[stage]}")
    check_pool("prune", "map" if model.attn_pool is not None else model.global_pool)
    if tokens.score == "predictor" and model.embed_dim % 4:
        raise ValueError("prune: score must be 'cls_attention' or 'random': predictors need a width that is a multiple of 4, "
                         f"got {model.embed_dim}")
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("prune: patch_drop_rate must be 0 where tokens are pruned")
    if not model.has_class_token:
        if tokens.score == "cls_attention":
            raise ValueError("prune: score must not be 'cls_attention': the model has no class token")
        if tokens.min_keep == 0:
            raise ValueError("prune: min_keep must be > 0: the model has no class token to be left with")


@torch.no_grad()
def compact(model: PrunedViT) -> PrunedViT:
    """A new model with the dead heads and hidden units physically gone; its outputs equal the masked model's.

    It trains, saves and can be pruned again. Raises TypeError for a model that `prune` did not make.
    """
    if not isinstance(model, (PrunedViT, PrunedDistilledViT)):
        raise TypeError(f"compact: model must come from vitprune.prune, got {type(model).__name__}")
    new = copy.deepcopy(model)
    learned.settle(new)
    for block in new.blocks:
        compact_block(block)
    return new


@torch.no_grad()
def compact_block(block: PrunedBlock) -> None:
    """Slice the weights of a block, in place, to its live heads, dimensions of heads and hidden units."""
    attn, mlp = block.attn, block.mlp
    if attn.live is not None or attn.dims is not None:
        H, D, device = attn.num_heads, attn.head_dim, attn.qkv.weight.device
        live = torch.arange(H, device=device) if attn.live is None else attn.live.long()
        dims = torch.arange(D, device=device).expand(2, H, D) if attn.dims is None else attn.dims
        qk, v = (live[:, None] * D + dims[:, live]).flatten(1)
        _slice(attn.qkv, torch.cat([qk, qk + H * D, v + 2 * H * D]), 0)
        _slice(attn.proj, v, 1)
        attn.num_heads, attn.head_dim = live.shape[0], dims.shape[-1]
        attn.attn_dim = attn.num_heads * attn.head_dim
        attn.set_live(None)
        attn.set_dims(None)
    if mlp.live is not None:
        units = block_index(mlp.live, mlp.width)
        _slice(mlp.fc1, units, 0)
        _slice(mlp.fc2, units, 1)
        mlp.set_live(None, mlp.width)


def _slice(linear: nn.Linear, index: Tensor, dim: int) -> None:
    if type(linear) is not nn.Linear or linear._parameters.get("weight") is None:
        raise ValueError(f"compact: layers that lose units must be plain nn.Linear (merge adapters and reparametrisations first), got "
                         f"{type(linear).__name__}")

    def kept(p: nn.Parameter, d: int) -> nn.Parameter:
        return nn.Parameter(p.index_select(d, index), requires_grad=p.requires_grad)

    linear.weight = kept(linear.weight, dim)
    if dim == 0 and linear.bias is not None:
        linear.bias = kept(linear.bias, 0)
    linear.out_features, linear.in_features = linear.weight.shape
