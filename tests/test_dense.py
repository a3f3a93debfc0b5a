"""The dense parts of a pruned model: timm's results by other calls, and hooks see their modules as ever."""
import sys

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprune import BlockPruning, prune


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}, {"dynamic_img_pad": True, "dynamic_img_size": True}])
def test_patches_by_a_product(options):
    """The patch embedding of a pruned model is timm's convolution, and so is its gradient."""
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=32, patch_size=(8, 4), embed_dim=48, depth=1, num_heads=3, **options).double().eval()
    pruned = prune(dense, blocks=BlockPruning())
    sizes = [(32, 32), (48, 20), (30, 35)] if "dynamic_img_pad" in options else [(32, 32), (48, 20)] if options else [(32, 32)]
    for size in sizes:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        for x in (images, images.to(memory_format=torch.channels_last), images[:0]):
            results = []
            for embed in (dense.patch_embed, pruned.patch_embed):
                y = embed(x.requires_grad_())
                results.append((y, *torch.autograd.grad(y.square().sum(), (x, embed.proj.weight, embed.proj.bias))))
            for theirs, ours in zip(*results):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if not options:
        with pytest.raises(AssertionError, match="Input height"):
            pruned.patch_embed(torch.zeros(2, 3, 40, 32, dtype=torch.float64))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_see_every_module(register):
    """Faster calls than a module's own are for modules that nobody watches."""
    dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3).eval()
    found = []
    for model in (dense, prune(dense, blocks=BlockPruning()).eval()):
        seen = set()
        leaves = [name for name, module in model.named_modules() if not any(module.children())]
        for name in (name for name in leaves if not name.endswith(("q_norm", "k_norm", "attn.norm", "mlp.norm"))):  # nothing
            getattr(model.get_submodule(name), register)(lambda *_, name=name: seen.add(name) and None)  # noqa: B023
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        found.append(seen)
    assert found[0] == found[1] and len(found[0]) > 20


@pytest.mark.parametrize("name", ["norm", "patch_embed.proj", "blocks.0.norm1", "blocks.0.ls1", "blocks.0.norm2", "blocks.0.mlp.fc2"])
def test_a_hook_may_change_what_its_module_gives(name):
    dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, init_values=0.1).eval()
    images, pruned = torch.randn(2, 3, 32, 32), prune(dense, blocks=BlockPruning()).eval()
    before = dense(images)
    for model in (dense, pruned):
        model.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.allclose(dense(images), before)
    torch.testing.assert_close(pruned(images), dense(images))


def test_overlapping_patches_stay_a_convolution():
    dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3).eval()
    dense.patch_embed.proj = nn.Conv2d(3, 48, 12, stride=8, padding=2)
    pruned, images = prune(dense, blocks=BlockPruning()), torch.randn(2, 3, 32, 32)
    assert torch.equal(pruned.patch_embed(images), dense.patch_embed(images))


def test_eager_evaluation_costs_the_host_little():
    """Small calls on a GPU take as long as the host does: a pruned block calls at most 1.6 times as many functions as timm's."""
    dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3).eval()
    pruned, x = prune(dense, blocks=BlockPruning()), torch.randn(1, 17, 48)

    def calls(block):
        count = 0

        def profile(_frame, event, _what):
            nonlocal count
            count += event in ("call", "c_call")
        with torch.no_grad():
            block(x)
            sys.setprofile(profile)
            try:
                block(x)
            finally:
                sys.setprofile(None)
        return count
    assert 0 < calls(dense.blocks[0]) < calls(pruned.blocks[0]) < 1.6 * calls(dense.blocks[0])
