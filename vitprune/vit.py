"""A timm vision transformer whose tokens, heads and hidden units are pruned."""
import math
import warnings
from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .blocks import BlockPruning
from .dense import PatchProduct, normalise, plain_norm, watched
from .layers import PrunedBlock, adopt
from .ops.checks import fail
from .ops.layer_norm import left_to_modules
from .ops.linear import weight_and_bias
from .ops.registry import transformed
from .split import State
from .tokens import TokenPredictor, TokenPruning, sample_policy

SPARSE_PAYS = 1 << 16, 0.15  # activations that are dropped, and of all: from here on a CPU a backward pass over kept tokens is faster


class PrunedOutput(NamedTuple):
    """What `pruned(images, details=True)` returns, for the losses."""
    logits: Tensor
    features: Tensor                # after the final norm, without prefix tokens: [B, N, C], or where tokens left for real
                                    # [B, K, C] (adaptive counts: [B, N, C] with zeros for the dropped)
    keep: Tensor | None             # [B, N] 1 where a patch is kept after the last stage; None without token pruning
    decisions: tuple[Tensor, ...]   # a stage: [B, N] straight-through keep decisions (training with a predictor)


class _Pruned:
    """What PrunedViT and PrunedDistilledViT add to their timm classes."""
    tokens: TokenPruning | None = None
    learning: BlockPruning | None = None    # while its heads and hidden units are being learned

    def _prepare(self) -> None:
        self.blocks = nn.Sequential(*(b if isinstance(b, PrunedBlock) else adopt(PrunedBlock, b) for b in self.blocks))
        self.blocks.training = self.training
        if type(self.patch_embed) is PatchEmbed:
            self.patch_embed = adopt(PatchProduct, self.patch_embed)

    def _set_tokens(self, tokens: TokenPruning) -> None:
        tokens.counts(self.patch_embed.num_patches, self.num_prefix_tokens)
        replaced, self.tokens = self.tokens, tokens
        if tokens.score != "predictor":
            self._modules.pop("score_predictor", None)
        elif replaced is None or replaced.score != "predictor" or replaced.at != tokens.at:
            p = next(self.parameters())
            self.score_predictor = nn.ModuleList(TokenPredictor(self.embed_dim) for _ in tokens.at).to(p.device, p.dtype)
            self.score_predictor.train(self.training)
            self.mark_untrained(True)

    @property
    def keep_counts(self) -> list[int]:
        """Patches kept after each stage, at the model's own image size."""
        return self._counts(self.patch_embed.num_patches)

    @property
    def keep_ratios(self) -> list[float]:
        """Target ratio of each stage, relative to the original patches."""
        return [] if self.tokens is None else self.tokens.ratios(self.patch_embed.num_patches)

    def _counts(self, num_patches: int) -> list[int]:
        return [] if self.tokens is None else self.tokens.counts(num_patches, self.num_prefix_tokens)

    # --- forward -----------------------------------------------------------------------------------------------------

    def _stream(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, sparse: bool | None = False) -> State:
        if not isinstance(images, Tensor):
            raise TypeError(f"PrunedViT: images must be a tensor, got {type(images).__name__}")
        H, W = self.patch_embed.img_size if getattr(self.patch_embed, "strict_img_size", False) else ("H", "W")
        fits = images.dim() == 4 and images.shape[1] == self.in_chans and (H == "H" or (images.shape[2] == H and images.shape[3] == W))
        if not fits or not images.is_floating_point():
            raise ValueError(f"PrunedViT: images must be floating point [B, {self.in_chans}, {H}, {W}], "
                             f"got {images.dtype} {tuple(images.shape)}")
        masked = attn_mask is not None or is_causal
        if masked and self.tokens is not None:
            raise ValueError("PrunedViT: attn_mask and is_causal must be off where tokens are pruned")
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))
        num_patches = x.shape[1] - self.num_prefix_tokens
        state, scores, normal = State(None, num_patches=num_patches), None, None  # without x while blocks run: it would be held
        at = () if self.tokens is None else self.tokens.at
        asks = self.tokens is not None and self.tokens.score == "cls_attention"
        sparse is None or isinstance(sparse, bool) or fail("PrunedViT", "sparse_backward", "a bool or None", repr(sparse))
        at_least, sparse = (0, 0.0) if sparse else SPARSE_PAYS, sparse or (sparse is None and x.device.type == "cpu")
        sparse = sparse and torch.is_grad_enabled() and not (self.grad_checkpointing or transformed())
        sparse = sparse and all(type(block) is PrunedBlock and block.splits() for block in self.blocks)
        checkpointed = self.grad_checkpointing and self.training
        options = {"attn_mask": attn_mask, "is_causal": is_causal} if masked else {}
        for i, block in enumerate(self.blocks):
            if i in at:
                state = self._prune_tokens(state._replace(x=x).whole(), at.index(i), num_patches, scores, block)
                state = state.parted(at_least) if sparse else state
                x, normal, state = state.x, state.normal, state._replace(x=None, normal=None)
                options = {} if state.policy is None else {"policy": state.policy}
                if state.cu_seqlens is not None:
                    options = {"cu_seqlens": state.cu_seqlens, "max_seqlen": num_patches + self.num_prefix_tokens}
            if state.split is not None:
                x, dropped = block.forward_split(x, state.dropped, state.split, state.policy)
                state = state._replace(dropped=dropped)
                continue
            asked = {"class_attention": True} if asks and i + 1 in at else {}
            if normal is not None:
                asked["normal"], normal = normal, None
            x = checkpoint(block, x, use_reentrant=False, **options, **asked) if checkpointed else block(x, **options, **asked)
            x, scores = x if "class_attention" in asked else (x, None)
        x = normalise(self.norm, state._replace(x=x).whole().x)
        if state.cu_seqlens is not None:
            x = ops.expand_rows(x, state.cu_seqlens, state.mask)
        return state._replace(x=x)

    def _prune_tokens(self, state: State, stage: int, num_patches: int, scores: Tensor | None, block: nn.Module) -> State:
        """block: the one that follows."""
        P, x, normal = self.num_prefix_tokens, state.x, None
        if self.tokens.score == "predictor" and self.training:
            previous = None if state.policy is None else state.policy[:, P:]
            decision = sample_policy(self.score_predictor[stage](x[:, P:], previous), previous)
            policy = torch.cat([decision.new_ones(x.shape[0], P), decision], dim=1)
            return state._replace(policy=policy, decisions=(*state.decisions, decision))
        if self.tokens.threshold is not None:
            return self._prune_adaptively(state, stage)
        k = self._counts(num_patches)[stage]
        if k == x.shape[1] - P:
            ids = torch.arange(k, device=x.device).expand(x.shape[0], -1)
        else:
            if self.tokens.score == "predictor":
                self._warn_untrained()
                scores = ops.score_tokens(x[:, P:], self.score_predictor[stage])
            elif self.tokens.score == "cls_attention":
                scores = scores[:, P:]
            else:
                scores = torch.rand(x.shape[0], x.shape[1] - P, device=x.device)
            if type(block) is PrunedBlock and not watched(block) and plain_norm(block.norm1) and not left_to_modules(x.device):
                x, ids, normal = ops.select_norm(x, scores, k, *weight_and_bias(block.norm1), block.norm1.eps, prefix=P)
            else:
                x, ids = ops.select_tokens(x, scores, k, prefix=P)
        return state._replace(x=x, stages=(*state.stages, ids), normal=normal)

    def _prune_adaptively(self, state: State, stage: int) -> State:
        """Keep what exceeds the threshold, image by image, as packed rows (the count differs between images)."""
        self._warn_untrained()
        P, x, before = self.num_prefix_tokens, state.x, None
        if state.cu_seqlens is not None:
            x, before = ops.expand_rows(x, state.cu_seqlens, state.mask), state.mask[:, P:]
        score = ops.score_tokens(x[:, P:], self.score_predictor[stage], before)
        threshold = self.tokens.threshold
        keep = score > (math.log(threshold / (1 - threshold)) if threshold else -math.inf)
        if before is not None:
            keep, score = keep & before, score.masked_fill(~before, -torch.inf)
        if self.tokens.min_keep:
            best = score.topk(min(self.tokens.min_keep, score.shape[1]), dim=1).indices
            keep = keep.scatter(1, best, torch.ones_like(best, dtype=torch.bool))
        mask = torch.cat([keep.new_ones(keep.shape[0], P), keep], dim=1)
        rows, cu_seqlens = ops.compact_tokens(x, mask)
        return state._replace(x=rows, mask=mask, cu_seqlens=cu_seqlens, stages=(*state.stages, keep))

    def mark_untrained(self, untrained: bool) -> None:
        """Remember (or forget) that the predictors' present weights are arbitrary."""
        known = self.score_predictor[0].out_conv[4].weight.detach().clone() if untrained else None
        self.register_buffer("_untrained", known, persistent=False)
        self._asked = not untrained

    def is_untrained(self) -> bool:
        """Whether the model has token predictors that were neither trained nor loaded."""
        known = self._buffers.get("_untrained") if "score_predictor" in self._modules else None
        return known is not None and torch.equal(known, self.score_predictor[0].out_conv[4].weight)

    def _warn_untrained(self) -> None:
        if torch.compiler.is_compiling() or self._asked:
            return
        self._asked = True  # no comparison on later calls
        if self.is_untrained():
            warnings.warn("the token predictors are untrained: which tokens are kept is arbitrary (train them, load a "
                          "checkpoint, or use score='cls_attention')", stacklevel=2)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, P+n, C] after the final norm; in evaluation the pruned ones are gone
        (adaptive counts: zero; `forward` then weighs them for average pooling, which forward_head alone does not)."""
        return self._stream(x, attn_mask, is_causal).x

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                details: bool = False, sparse_backward: bool | None = False) -> Tensor | PrunedOutput:
        """Images [B, 3, H, W] -> logits; with details, a PrunedOutput.

        sparse_backward: in training under a policy compute gradients for kept tokens alone. For a loss that reads no dropped token they
        are all there is but for what attention's `eps` gives to dropped keys. Where that is more than 1e-3 of the norm of the gradient of a
        block's queries, keys and values, or the loss does read them, the backward pass raises split.DroppedGradient, for a second
        derivative RuntimeError. It has no effect with checkpointed, compiled or transformed blocks, nor where a block has dropout,
        stochastic depth, hooks, no head or parts of another kind. None: where that was measured to be faster, on a CPU with enough
        dropped tokens.
        """
        state, P = self._stream(x, attn_mask, is_causal, sparse_backward), self.num_prefix_tokens
        policy = state.mask if state.policy is None else state.policy
        logits = self.forward_head(state.x if policy is None else self._weigh(state.x, policy))
        if details and isinstance(logits, tuple):
            raise ValueError("PrunedViT: details must be False after set_distilled_training(True), which makes two kinds of logits")
        if not details:
            return logits
        keep = None if policy is None else policy[:, P:].detach().to(state.x.dtype)
        if state.stages and state.mask is None:
            keep = state.x.new_zeros(x.shape[0], state.num_patches).scatter(1, state.on_grid()[-1], 1.0)
        return PrunedOutput(logits, state.x[:, P:], keep, state.decisions)

    def _weigh(self, x: Tensor, policy: Tensor) -> Tensor:
        """For average pooling: scale tokens so that the plain mean is the mean over kept ones."""
        if self.global_pool != "avg":
            return x
        P = 0 if self.pool_include_prefix else self.num_prefix_tokens
        weight = policy[:, P:].to(x.dtype)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-6) * weight.shape[1]
        return torch.cat([x[:, :P], x[:, P:] * weight[..., None]], dim=1)

    @torch.no_grad()
    def trace_tokens(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> a stage: ids of the kept patches on the original grid, int64 [B, K_s], ascending; with
        adaptive counts padded by -1. Evaluation only: raises RuntimeError in training mode."""
        if self.training:
            raise RuntimeError("trace_tokens: the model must be in evaluation mode (call model.eval()), it is in training mode")
        stages = self._stream(images).on_grid()
        if stages and stages[0].dtype == torch.bool:
            widths = [int(s.sum(1).max()) if len(s) else 0 for s in stages]
            order = [(~s).to(torch.uint8).sort(dim=1, stable=True).indices for s in stages]
            return [torch.where(s.gather(1, o), o, -1)[:, :w] for s, o, w in zip(stages, order, widths)]
        return stages

    # --- the rest of timm's interface --------------------------------------------------------------------------------

    def forward_intermediates(self, x: Tensor, *args, **kwargs):
        """timm's, for models that keep all their tokens; raises ValueError where tokens are gone."""
        if self.tokens is not None:
            raise ValueError("forward_intermediates: the model must keep all its tokens, but token pruning removes patches "
                             f"before blocks {self.tokens.at}: there is no full grid to return")
        return super().forward_intermediates(x, *args, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's; raises ValueError for a pooling that has no meaning where tokens are gone."""
        if self.tokens is not None and global_pool is not None:
            check_pool("reset_classifier", global_pool)
        super().reset_classifier(num_classes, global_pool)

    def prune_intermediate_layers(self, *args, **kwargs):
        """timm's, for models that keep all their tokens; raises ValueError where tokens leave before blocks by number."""
        if self.tokens is not None:
            raise ValueError("prune_intermediate_layers: the model must keep all its tokens, but token pruning removes patches "
                             f"before blocks {self.tokens.at}: drop layers first, then prune tokens")
        return super().prune_intermediate_layers(*args, **kwargs)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's layer groups; the token predictors go with the last group."""
        groups = super().group_matcher(coarse)
        return groups | {"blocks": [*groups["blocks"], (r"^score_predictor", (99999,))]}


class PrunedViT(_Pruned, VisionTransformer):
    """A pruned timm `VisionTransformer`; made by `vitprune.prune`, never by its constructor."""


class PrunedDistilledViT(_Pruned, VisionTransformerDistilled):
    """A pruned timm `VisionTransformerDistilled`; made by `vitprune.prune`, never by its constructor."""


def check_pool(function: str, pool: str) -> None:
    if pool not in ("token", "avg"):
        raise ValueError(f"{function}: global_pool must be 'token' or 'avg' where tokens are pruned, got {pool!r}")
