"""Small vision transformers without a parameter at a value that hides a mistake."""
import torch
from timm.models.vision_transformer import VisionTransformer

from vitprune import BlockPruning, TokenPruning

UNEVEN = BlockPruning(heads=[0, 0.5, 1, 0.25], hidden=[0, 0.25, 0.5, 1])


def vit(**options):
    torch.manual_seed(0)
    model = VisionTransformer(**{"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 5, **options})
    for p in model.parameters():  # no parameter at a value that hides a mistake (zero biases, unit scales)
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def tokens(keep=0.6, **options):
    return TokenPruning(keep, **{"at": (1, 2, 3), **options})
