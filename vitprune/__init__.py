"""Pruned vision transformers as fast as their FLOP counts promise."""
from . import ops
from .blocks import BlockPruning
from .layers import PrunedAttention, PrunedBlock, PrunedMlp
from .tokens import TokenPruning
from .vit import PrunedDistilledViT, PrunedOutput, PrunedViT, compact, prune

__all__ = ["BlockPruning", "PrunedAttention", "PrunedBlock", "PrunedDistilledViT", "PrunedMlp", "PrunedOutput", "PrunedViT",
           "TokenPruning", "compact", "ops", "prune"]
