"""Pruned vision transformers as fast as their FLOP counts promise."""
import importlib.util

if importlib.util.find_spec("vitprune.kernels") is None:  # kernels/ joins the package only when it is installed
    raise ImportError(f"vitprune: {__path__[0]} is a checkout that is not installed: run `pip install -e .` beside it")

from . import ops
from .blocks import BlockPruning
from .checkpoint import load, save
from .convert import load_dynamicvit, load_weights
from .engine import accelerate
from .layers import PrunedAttention, PrunedBlock, PrunedMlp
from .learned import Cubic
from .surgery import compact, prune
from .tokens import TokenPruning
from .vit import PrunedDistilledViT, PrunedOutput, PrunedViT

__all__ = ["BlockPruning", "Cubic", "PrunedAttention", "PrunedBlock", "PrunedDistilledViT", "PrunedMlp", "PrunedOutput", "PrunedViT",
           "TokenPruning", "accelerate", "compact", "load", "load_dynamicvit", "load_weights", "ops", "prune", "save"]
