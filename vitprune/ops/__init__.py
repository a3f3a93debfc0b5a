"""The operators of a pruned vision transformer: one file each, with definition, gradient and choice of backend."""
from .add_norm import add_norm
from .compact_tokens import compact_tokens, expand_rows
from .layer_norm import layer_norm
from .linear import linear
from .policy_attention import policy_attention, softmax_with_policy, split_qkv
from .registry import backend
from .score_tokens import score_tokens
from .select_norm import select_norm
from .select_tokens import select_tokens
from .short_attention import short_attention
from .sliced_linear import sliced_linear
from .sliced_mlp import sliced_mlp

__all__ = ["add_norm", "backend", "compact_tokens", "expand_rows", "layer_norm", "linear", "policy_attention", "score_tokens",
           "select_norm", "select_tokens", "short_attention", "sliced_linear", "sliced_mlp", "softmax_with_policy", "split_qkv"]
