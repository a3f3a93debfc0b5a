"""Every kind of bad input at the public surface and the one error that answers it: it names the argument, what was expected, what came."""
import math
from fractions import Fraction
from functools import partial

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from vitprune import BlockPruning, PrunedAttention, PrunedMlp, TokenPruning, accelerate, compact, ops, prune
from vitprune.tokens import TokenPredictor

Z = torch.zeros
IDS = partial(torch.tensor, dtype=torch.int32)


def vit(**options):
    return VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 5, **options})


def sequence(**options):
    return prune(vit(), TokenPruning(0.5, at=(1,), **options)).eval()


def q(*shape):
    return Z(shape or (2, 3, 5, 4))


def doubled(module, name):
    """The state of a ViT with one tensor changed."""
    state = module.state_dict()
    return {**state, name: torch.cat([state[name]] * 2)}


OPERATORS = {
    "policy_attention: q must be [B, H, N, D], got (3, 5, 4)": lambda: ops.policy_attention(q(3, 5, 4), q(), q(), Z(2, 5)),
    "policy_attention: k must be like q, (2, 3, 5, 4), got (2, 3, 6, 4)": lambda: ops.policy_attention(q(), q(2, 3, 6, 4), q(), Z(2, 5)),
    "policy_attention: v must be of q's dtype torch.float32, got torch.float16":
        lambda: ops.policy_attention(q(), q(), q().half(), Z(2, 5)),
    "policy_attention: q must be a float of 16, 32 or 64 bits, got torch.int64":
        lambda: ops.policy_attention(q().long(), q().long(), q().long(), Z(2, 5)),
    "policy_attention: policy must be [B, N] = (2, 5), got (2, 4)": lambda: ops.policy_attention(q(), q(), q(), Z(2, 4)),
    "policy_attention: policy must be a float of 16, 32 or 64 bits, got torch.bool":
        lambda: ops.policy_attention(q(), q(), q(), Z(2, 5).bool()),
    "policy_attention: k must be on q's device cpu, got meta": lambda: ops.policy_attention(q(), q().to("meta"), q(), Z(2, 5)),
    "policy_attention: policy must be on q's device cpu, got meta": lambda: ops.policy_attention(q(), q(), q(), Z(2, 5, device="meta")),
    "policy_attention: scale must be a finite number (it has no gradient), got tensor(1.)":
        lambda: ops.policy_attention(q(), q(), q(), Z(2, 5), scale=torch.tensor(1.0)),
    "policy_attention: eps must be a finite number >= 0, got 'tiny'": lambda: ops.policy_attention(q(), q(), q(), Z(2, 5), eps="tiny"),
    "short_attention: scale must be a finite number (it has no gradient), got '1/8'":
        lambda: ops.short_attention(Z(2, 5, 36), num_heads=3, scale="1/8"),
    "expand_rows: fill must be one of torch.int64, as rows, got 2.5":
        lambda: ops.expand_rows(Z(1, 2).long(), IDS([0, 1]), torch.ones(1, 1, dtype=torch.bool), fill=2.5),
    "expand_rows: fill must be one of torch.bool, as rows, got 2":
        lambda: ops.expand_rows(Z(1, 2).bool(), IDS([0, 1]), torch.ones(1, 1, dtype=torch.bool), fill=2),
    "add_norm: weight must be a float of 16, 32 or 64 bits, got torch.int64":
        lambda: ops.add_norm(Z(2, 4), Z(2, 4), Z(4).long(), None, 1e-6),
    "layer_norm: bias must be a float of 16, 32 or 64 bits, got torch.bool": lambda: ops.layer_norm(Z(2, 4), Z(4), Z(4).bool(), 1e-6),
    "sliced_linear: x must be a float of 16, 32 or 64 bits, got torch.int64":
        lambda: ops.sliced_linear(Z(2, 4).long(), Z(4, 4), None, IDS([0]), side="out", width=2),
    "sliced_mlp: x must be a float of 16, 32 or 64 bits, got torch.int64":
        lambda: ops.sliced_mlp(Z(2, 4).long(), Z(4, 4), None, Z(4, 4), None, IDS([0]), width=2),
    "split_qkv: qkv must be [B, N, 3*H*D], got (3, 5)": lambda: ops.split_qkv(Z(3, 5), 1),
    "split_qkv: num_heads must be a divisor of 24 / 3 channels, got 3": lambda: ops.split_qkv(Z(2, 5, 24), 3),
    "policy_attention: eps must be a finite number >= 0, got inf": lambda: ops.policy_attention(q(), q(), q(), Z(2, 5), eps=math.inf),
    "policy_attention: eps must be a finite number >= 0, got -1.0": lambda: ops.policy_attention(q(), q(), q(), Z(2, 5), eps=-1.0),
    "short_attention: qkv must be [B, N, 3*H*D], got (5, 36)": lambda: ops.short_attention(Z(5, 36), num_heads=3),
    "short_attention: num_heads must be a positive int that divides 36 / 3, got 5": lambda: ops.short_attention(Z(2, 5, 36), num_heads=5),
    "short_attention: num_heads must be a positive int that divides 36 / 3, got 2.0":
        lambda: ops.short_attention(Z(2, 5, 36), num_heads=2.0),
    "short_attention: max_seqlen must be an int >= 0 with cu_seqlens, got 6.0":
        lambda: ops.short_attention(Z(5, 36), num_heads=3, cu_seqlens=IDS([0, 5]), max_seqlen=6.0),
    "short_attention: cu_seqlens must be int32 [B+1], got torch.int64 (2,)":
        lambda: ops.short_attention(Z(5, 36), num_heads=3, cu_seqlens=torch.tensor([0, 5]), max_seqlen=5),
    "short_attention: qkv must be a float of 16, 32 or 64 bits, got torch.int64":
        lambda: ops.short_attention(Z(2, 5, 36).long(), num_heads=3),
    "short_attention: cu_seqlens must be on qkv's device cpu, got meta":
        lambda: ops.short_attention(Z(5, 36), num_heads=3, cu_seqlens=IDS([0, 5]).to("meta"), max_seqlen=5),
    "short_attention: max_seqlen must be an int >= 0 with cu_seqlens, got None":
        lambda: ops.short_attention(Z(5, 36), num_heads=3, cu_seqlens=IDS([0, 5])),
    "select_tokens: x must be [B, P+N, C], got (5, 4)": lambda: ops.select_tokens(Z(5, 4), Z(1, 4), 2),
    "select_tokens: x must be a float of 16, 32 or 64 bits, got torch.int64": lambda: ops.select_tokens(Z(1, 5, 4).long(), Z(1, 4), 2),
    "select_tokens: scores must be [B, N] = (1, 4), got (1, 5)": lambda: ops.select_tokens(Z(1, 5, 4), Z(1, 5), 2),
    "select_tokens: k must be an int in 0..4, got 5": lambda: ops.select_tokens(Z(1, 5, 4), Z(1, 4), 5),
    "select_tokens: k must be an int in 0..4, got -1": lambda: ops.select_tokens(Z(1, 5, 4), Z(1, 4), -1),
    "select_tokens: prefix must be an int in 0..5, the number of tokens, got 6":
        lambda: ops.select_tokens(Z(1, 5, 4), Z(1, 4), 2, prefix=6),
    "select_tokens: prefix must be an int in 0..5, the number of tokens, got 1.0":
        lambda: ops.select_tokens(Z(1, 5, 4), Z(1, 4), 2, prefix=1.0),
    "compact_tokens: x must be [B, N, C], got (5, 4)": lambda: ops.compact_tokens(Z(5, 4), Z(5, 4).bool()),
    "compact_tokens: keep must be bool, got torch.float32": lambda: ops.compact_tokens(Z(1, 5, 4), Z(1, 5)),
    "compact_tokens: keep must be [B, N] = (1, 5), got (1, 4)": lambda: ops.compact_tokens(Z(1, 5, 4), Z(1, 4).bool()),
    "compact_tokens: capacity must be an int >= 0, got -1": lambda: ops.compact_tokens(Z(1, 5, 4), Z(1, 5).bool(), capacity=-1),
    "compact_tokens: capacity must be an int >= 0, got 7.5": lambda: ops.compact_tokens(Z(1, 5, 4), Z(1, 5).bool(), capacity=7.5),
    "expand_rows: rows must be [R, C], got (5,)": lambda: ops.expand_rows(Z(5), IDS([0, 5]), Z(1, 5).bool()),
    "expand_rows: cu_seqlens must be int32 or int64, got torch.float32": lambda: ops.expand_rows(Z(5, 4), Z(2), Z(1, 5).bool()),
    "expand_rows: cu_seqlens must be keep's counts, summed, [0, 2, 5], got [0, 3, 5]":
        lambda: ops.expand_rows(Z(5, 4), IDS([0, 3, 5]), IDS([[1, 1, 0], [1, 1, 1]]).bool()),
    "expand_rows: rows must be [R, C] with R >= cu_seqlens[-1] = 2, got (1, 4)":
        lambda: ops.expand_rows(Z(1, 4), torch.tensor([0, 2]), IDS([[1, 1, 0]]).bool()),
    "expand_rows: cu_seqlens must be [B+1] = (2,), got (3,)": lambda: ops.expand_rows(Z(5, 4), IDS([0, 5, 5]), Z(1, 5).bool()),
    "sliced_linear: side must be 'in' or 'out', got 'up'": lambda: ops.sliced_linear(Z(2, 8), Z(8, 8), None, IDS([0]), side="up", width=4),
    "sliced_linear: width must be a positive int that divides 8, got 3":
        lambda: ops.sliced_linear(Z(2, 8), Z(8, 8), None, IDS([0]), side="out", width=3),
    "sliced_linear: width must be a positive int that divides 8, got 4.0":
        lambda: ops.sliced_linear(Z(2, 8), Z(8, 8), None, IDS([0]), side="out", width=4.0),
    "sliced_linear: x must be [..., 8], got (2, 7)": lambda: ops.sliced_linear(Z(2, 7), Z(8, 8), None, IDS([0]), side="out", width=4),
    "sliced_linear: live must be int32 [L], got torch.int64 (1,)":
        lambda: ops.sliced_linear(Z(2, 8), Z(8, 8), None, torch.tensor([0]), side="out", width=4),
    "sliced_linear: live must be ids in 0..1, each once, got [0, 2]":
        lambda: ops.sliced_linear(Z(2, 8), Z(8, 8), None, IDS([0, 2]), side="out", width=4),
    "sliced_linear: live must be ids in 0..1, each once, got [-1]":
        lambda: ops.sliced_linear(Z(2, 8), Z(8, 8), None, IDS([-1]), side="out", width=4),
    "sliced_mlp: live must be ids in 0..3, each once, got [1, 1]":
        lambda: ops.sliced_mlp(Z(2, 8), Z(16, 8), None, Z(8, 16), None, IDS([1, 1]), width=4),
    "sliced_mlp: w2 must be torch.float32 as x, got torch.float16":
        lambda: ops.sliced_mlp(Z(2, 8), Z(16, 8), None, Z(8, 16).half(), None, None),
    "sliced_linear: w must be torch.float32 as x, got torch.float16":
        lambda: ops.sliced_linear(Z(2, 8), Z(16, 8).half(), None, IDS([0]), side="out", width=4),
    "add_norm: eps must be a number >= 0, got nan": lambda: ops.add_norm(Z(2, 8), Z(2, 8), Z(8), Z(8), float("nan")),
    "add_norm: weight must be a tensor, got None": lambda: ops.add_norm(Z(2, 8), Z(2, 8), None, Z(8), 1e-6),
    "add_norm: bias must be torch.float32 as weight, got torch.float16": lambda: ops.add_norm(Z(2, 8), Z(2, 8), Z(8), Z(8).half(), 1e-6),
    "layer_norm: eps must be a number >= 0, got '1'": lambda: ops.layer_norm(Z(2, 8), Z(8), Z(8), "1"),
    "layer_norm: eps must be a number >= 0, got -1": lambda: ops.layer_norm(Z(2, 8), Z(8), Z(8), -1),
    "layer_norm: weight must be a tensor, got None": lambda: ops.layer_norm(Z(2, 8), None, Z(8), 1e-6),
    "sliced_mlp: w2 must be [C, F] with F = 16, got (8, 15)":
        lambda: ops.sliced_mlp(Z(2, 8), Z(16, 8), None, Z(8, 15), None, IDS([0]), width=4),
    "sliced_mlp: width must be a positive int that divides F = 16, got 4.0":
        lambda: ops.sliced_mlp(Z(2, 8), Z(16, 8), None, Z(8, 16), None, IDS([0]), width=4.0),
    "sliced_mlp: b1 must be [16], got (8,)": lambda: ops.sliced_mlp(Z(2, 8), Z(16, 8), Z(8), Z(8, 16), None, IDS([0]), width=4),
    "add_norm: x must be [..., C], got ()": lambda: ops.add_norm(Z(()), Z(()), Z(1), Z(1), 1e-6),
    "add_norm: x must be a float of 16, 32 or 64 bits, got torch.int64": lambda: ops.add_norm(Z(2, 4).long(), Z(2, 4), Z(4), Z(4), 1e-6),
    "add_norm: residual must be like x, (2, 5, 4), got (2, 4, 4)": lambda: ops.add_norm(Z(2, 5, 4), Z(2, 4, 4), Z(4), Z(4), 1e-6),
    "add_norm: weight must be [C] = (4,), got (5,)": lambda: ops.add_norm(Z(2, 5, 4), Z(2, 5, 4), Z(5), Z(4), 1e-6),
    "add_norm: gamma must be on x's device cpu, got meta":
        lambda: ops.add_norm(Z(2, 4), Z(2, 4), Z(4), Z(4), 1e-6, gamma=Z(4, device="meta")),
    "score_tokens: mask must be on patches's device cpu, got meta":
        lambda: ops.score_tokens(Z(1, 5, 8), TokenPredictor(8), Z(1, 5, device="meta") == 0),
    "score_tokens: patches must be torch.float32, as the predictor's weights, got torch.float64":
        lambda: ops.score_tokens(Z(1, 5, 8).double(), TokenPredictor(8)),
    "score_tokens: predictor must be on patches's device cpu, got meta":
        lambda: ops.score_tokens(Z(1, 5, 8), TokenPredictor(8).to("meta")),
    "policy_attention: policy must be a tensor, got None": lambda: ops.policy_attention(q(), q(), q(), None),
    "policy_attention: q must be a float of 16, 32 or 64 bits, got torch.float8_e4m3fn":
        lambda: ops.policy_attention(*3 * [q().to(torch.float8_e4m3fn)], Z(2, 5)),
    "policy_attention: scale must be a finite number (it has no gradient), got nan":
        lambda: ops.policy_attention(q(), q(), q(), Z(2, 5), scale=math.nan),
    "policy_attention: scale must be a finite number (it has no gradient), got Fraction(1, 8)":
        lambda: ops.policy_attention(q(), q(), q(), Z(2, 5), scale=Fraction(1, 8)),
    "layer_norm: eps must be a number >= 0, got inf": lambda: ops.layer_norm(Z(2, 8), Z(8), Z(8), math.inf),
    "add_norm: eps must be a number >= 0, got 1000": lambda: ops.add_norm(Z(2, 8), Z(2, 8), Z(8), Z(8), 10 ** 400),
    "policy_attention: eps must be a finite number >= 0, got True": lambda: ops.policy_attention(q(), q(), q(), Z(2, 5), eps=True),
    "short_attention: max_seqlen must be None without cu_seqlens, got 5":
        lambda: ops.short_attention(Z(2, 5, 36), num_heads=3, max_seqlen=5),
    "select_tokens: k must be an int in 0..4, got tensor(2)": lambda: ops.select_tokens(Z(1, 5, 4), Z(1, 4), torch.tensor(2)),
    "compact_tokens: keep must be a tensor, got [[True]]": lambda: ops.compact_tokens(Z(1, 1, 4), [[True]]),
    "sliced_linear: live must be a tensor, got [0]": lambda: ops.sliced_linear(Z(2, 8), Z(8, 8), None, [0], side="out", width=4),
    "sliced_mlp: width must be a positive int, got -3": lambda: ops.sliced_mlp(Z(2, 8), Z(16, 8), None, Z(8, 16), None, None, width=-3),
    "sliced_mlp: residual must be a float of 16, 32 or 64 bits, got torch.int64":
        lambda: ops.sliced_mlp(Z(2, 8), Z(16, 8), None, Z(8, 16), None, None, residual=Z(2, 8).long()),
    "sliced_mlp: residual must be a tensor, got [0]": lambda: ops.sliced_mlp(Z(2, 8), Z(16, 8), None, Z(8, 16), None, None, residual=[0]),
    "score_tokens: predictor must be a module, got None": lambda: ops.score_tokens(Z(1, 5, 8), None),
    "score_tokens: mask must be a tensor, got [1]": lambda: ops.score_tokens(Z(1, 5, 8), TokenPredictor(8), [1]),
    "backend: name must be one of": lambda: ops.backend("tritn").__enter__(),
}

PRUNING = {
    "TokenPruning: keep must be a number or a sequence, got '0.7'": lambda: TokenPruning("0.7"),
    "TokenPruning: keep must be a number or a sequence, got None": lambda: TokenPruning(None),
    "TokenPruning: keep must be numbers, got (0.5, True, 'x')": lambda: TokenPruning([0.5, True, "x"]),
    "TokenPruning: at must be a sequence of block numbers, got 5": lambda: TokenPruning(0.7, at=5),
    "TokenPruning: threshold must be None or a number, got 'a'": lambda: TokenPruning(0.7, threshold="a"),
    "TokenPruning: multiple_of must be an int, got 2.5": lambda: TokenPruning(0.7, multiple_of=2.5),
    "TokenPruning: min_keep must be an int, got 1.5": lambda: TokenPruning(0.7, min_keep=1.5),
    "BlockPruning: heads must be a fraction, or a sequence of them, got None": lambda: BlockPruning(heads=None),
    "BlockPruning: hidden must be a fraction, or a sequence of them, got '0.5'": lambda: BlockPruning(hidden="0.5"),
    "BlockPruning: budget must be None or a number, got 'x'": lambda: BlockPruning(budget="x"),
    "BlockPruning: granularity must be an int >= 1, got 2.0": lambda: BlockPruning(granularity=2.0),
    "PrunedViT: images must be floating point [B, 3, 32, 32], got torch.float32 (3, 32, 32)": lambda: sequence()(Z(3, 32, 32)),
    "PrunedViT: images must be floating point [B, 3, 32, 32], got torch.uint8 (1, 3, 32, 32)":
        lambda: sequence()(Z(1, 3, 32, 32).to(torch.uint8)),
    "TokenPruning: keep must be in (0, 1], got 0": lambda: TokenPruning(0),
    "TokenPruning: keep must be in (0, 1], got 1.2": lambda: TokenPruning(1.2),
    "TokenPruning: keep must be in (0, 1], got nan": lambda: TokenPruning(float("nan")),
    "TokenPruning: keep must be a base rate in (0, 1] or one entry for each of the 3 stages, got (0.5,)": lambda: TokenPruning([0.5]),
    "TokenPruning: keep of stage 1 must be at most the stage before, 0.5, got 0.7": lambda: TokenPruning([0.5, 0.7], at=(1, 2)),
    "TokenPruning: keep of stage 2 must be >= 0 (base rate 0.3, subtractive), got -0.1": lambda: TokenPruning(0.3, schedule="subtractive"),
    "TokenPruning: schedule must be one of ('geometric', 'subtractive'), got linear": lambda: TokenPruning(0.5, schedule="linear"),
    "TokenPruning: score must be one of": lambda: TokenPruning(0.5, score="attention"),
    "TokenPruning: at must be ascending block numbers >= 0, each once, got (3, 1)": lambda: TokenPruning(0.5, at=(3, 1)),
    "TokenPruning: at must be > 0 for cls_attention": lambda: TokenPruning(0.5, at=(0,), score="cls_attention"),
    "TokenPruning: threshold must be None or in [0, 1), got 1": lambda: TokenPruning(0.5, threshold=1),
    "TokenPruning: threshold must be None unless score='predictor'": lambda: TokenPruning(0.5, threshold=0.5, score="random"),
    "TokenPruning: multiple_of must be None or >= 1, got 0": lambda: TokenPruning(0.5, multiple_of=0),
    "TokenPruning: keep of stage 0 (before block 1) must be at least min_keep=9 of 16 patches, got 8": lambda: sequence(min_keep=9),
    "BlockPruning: heads must be in [0, 1], got 1.5": lambda: BlockPruning(heads=1.5),
    "BlockPruning: hidden must be in [0, 1], got -0.1": lambda: BlockPruning(hidden=-0.1),
    "BlockPruning: method must be one of": lambda: BlockPruning(method="l0"),
    "BlockPruning: start must be None, 'sensitivity' or 'zero', got 'one'": lambda: BlockPruning(method="movement", start="one"),
    "BlockPruning: start must be None for method='random', got 'zero'": lambda: BlockPruning(method="random", start="zero"),
    "BlockPruning: start must be None or 'zero' with a threshold, got 'sensitivity'":
        lambda: BlockPruning(method="movement", threshold=0.5, start="sensitivity"),
    "BlockPruning: granularity must be an int >= 1, got 0": lambda: BlockPruning(granularity=0),
    "BlockPruning: seed must be an int >= 0, got 'a'": lambda: BlockPruning(0.5, method="random", seed="a"),
    "BlockPruning: schedule must be a Cubic, got 'x'": lambda: BlockPruning(0.5, method="movement", schedule="x"),
    "BlockPruning: heads must be 'h_FRACTION_d_FRACTION' joined by '-', got 'h_1.2.3_d_0.4'": lambda: BlockPruning("h_1.2.3_d_0.4"),
    "PrunedAttention: live must be ids of heads, got [0.5]": lambda: PrunedAttention(64, num_heads=4, live=[0.5]),
    "PrunedAttention: live must be ids of heads, got [False, True]": lambda: PrunedAttention(64, num_heads=2, live=[False, True]),
    "PrunedMlp: live must be ids of hidden blocks, got tensor([False,  True])":
        lambda: PrunedMlp(64, hidden_features=128, live=torch.tensor([False, True])),
    "PrunedAttention: live must be ids of heads, got 3": lambda: PrunedAttention(64, num_heads=4, live=3),
    "TokenPruning: multiple_of must be an int, got True": lambda: TokenPruning(0.5, multiple_of=True),
    "accelerate: dtype must be a floating point torch.dtype, got 'float32'": lambda: accelerate(sequence(), 1, dtype="float32"),
    "BlockPruning: budget must be None or in (0, 1], got 0": lambda: BlockPruning(budget=0),
    "BlockPruning: budget must be None where heads or hidden are given, got 0.5": lambda: BlockPruning(0.5, budget=0.5),
    "BlockPruning: heads must be one fraction, or one for each of 4 layers, got (0.5, 1)":
        lambda: prune(vit(), blocks=BlockPruning([0.5, 1])),
    "BlockPruning: granularity must be a divisor of the hidden size 256 of block 0, got 48":
        lambda: prune(vit(), blocks=BlockPruning(granularity=48)),
    "BlockPruning: budget must be reachable": lambda: prune(vit(), blocks=BlockPruning(budget=0.01)),
    "prune: tokens or blocks must be given, got neither": lambda: prune(vit()),
    "prune: tokens must be a TokenPruning, got float": lambda: prune(vit(), 0.7),
    "prune: blocks must be a BlockPruning, got float": lambda: prune(vit(), None, 0.5),
    "prune: model must be a timm VisionTransformer or VisionTransformerDistilled, got torch.nn.modules.linear.Linear":
        lambda: prune(nn.Linear(2, 2), TokenPruning(0.5)),
    "prune: model must be a timm VisionTransformer or VisionTransformerDistilled, got timm.models.swin":
        lambda: prune(timm.create_model("swin_tiny_patch4_window7_224"), TokenPruning(0.5)),
    "prune: blocks.0 must be timm's Block, got ParallelScalingBlock": lambda: prune(vit(block_fn=ParallelScalingBlock), TokenPruning(0.5)),
    "prune: blocks.0.mlp must be timm's Mlp, got SwiGLU": lambda: prune(vit(mlp_layer=SwiGLU), TokenPruning(0.5)),
    "PrunedMlp: act_layer must be the exact GELU, got ReLU()": lambda: prune(vit(act_layer=nn.ReLU), TokenPruning(0.5, at=(1,))),
    "PrunedAttention: gated and scale_norm must be off": lambda: prune(vit(scale_attn_norm=True), TokenPruning(0.5, at=(1,))),
    "prune: score must be 'cls_attention' or 'random': predictors need a width that is a multiple of 4, got 34":
        lambda: prune(vit(embed_dim=34, num_heads=2), TokenPruning(0.5, at=(1,))),
    "prune: blocks must be None for a model whose blocks are masked or being learned":
        lambda: prune(prune(vit(), blocks=BlockPruning(heads=0.5)), blocks=BlockPruning(hidden=0.5)),
    "reset_classifier: global_pool must be 'token' or 'avg' where tokens are pruned, got 'max'":
        lambda: prune(vit(), TokenPruning(0.5, at=(1,))).reset_classifier(5, "max"),
    "prune_intermediate_layers: the model must keep all its tokens":
        lambda: prune(vit(), TokenPruning(0.5, at=(1,))).prune_intermediate_layers([0]),
    "PrunedViT: images must be a tensor, got NoneType": lambda: prune(vit(), TokenPruning(0.5, at=(1,)))(None),
    "prune: global_pool must be 'token' or 'avg' where tokens are pruned, got 'map'":
        lambda: prune(vit(global_pool="map"), TokenPruning(0.5, at=(1,))),
    "prune: patch_drop_rate must be 0": lambda: prune(vit(patch_drop_rate=0.1), TokenPruning(0.5, at=(1,))),
    "prune: at of stage 1 must be a block in 0..3, got 6": lambda: prune(vit(), TokenPruning(0.5)),
    "prune: score must not be 'cls_attention': the model has no class token":
        lambda: prune(vit(class_token=False, global_pool="avg"), TokenPruning(0.5, at=(1,), score="cls_attention")),
    "compact: model must come from vitprune.prune, got VisionTransformer": lambda: compact(vit()),
    "PrunedAttention: live must be ascending ids of heads in 0..7, each once, got [3, 1]": lambda: PrunedAttention(64, live=[3, 1]),
    "PrunedAttention: live must be ascending ids of heads in 0..7, each once, got [8]": lambda: PrunedAttention(64, live=[8]),
    "PrunedAttention: attn_mask and is_causal must be off where a policy":
        lambda: PrunedAttention(64)(Z(1, 5, 64), attn_mask=Z(5, 5), policy=Z(1, 5)),
    "PrunedMlp: width must be a divisor of the hidden size 256, got 100": lambda: PrunedMlp(64, 256, live=[0], width=100),
    "PrunedMlp: use_conv must be False": lambda: PrunedMlp(64, 256, use_conv=True),
    "forward_intermediates: the model must keep all its tokens": lambda: sequence().forward_intermediates(Z(1, 3, 32, 32)),
    "trace_tokens: the model must be in evaluation mode": lambda: sequence().train().trace_tokens(Z(1, 3, 32, 32)),
    "PrunedViT: images must be floating point [B, 3, 32, 32], got torch.float32 (1, 3, 40, 40)": lambda: sequence()(Z(1, 3, 40, 40)),
}


def fails_with(message, action, *args):
    with pytest.raises((ValueError, TypeError, RuntimeError, FileNotFoundError)) as caught:
        action(*args)
    assert message in str(caught.value)
    return caught.value


@pytest.mark.parametrize("message", [*OPERATORS, *PRUNING])
def test_arguments(message):
    fails_with(message, {**OPERATORS, **PRUNING}[message])


def test_a_traced_size_is_an_int():
    def traced(x, keep):
        N = x.shape[1]
        kept, _ = ops.select_tokens(x, x[:, 1:, 0], N - 3)
        rows, ends = ops.compact_tokens(x, keep, capacity=N + 1)
        return kept, ops.short_attention(rows, num_heads=2, cu_seqlens=ends, max_seqlen=N)
    make_fx(traced, tracing_mode="symbolic")(Z(1, 5, 12), Z(1, 5) == 0)  # a symbol is not refused
