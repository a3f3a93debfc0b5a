"""The dense parts of a pruned model: timm's results by other calls, and hooks see their modules as ever."""
import sys

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import prune as torch_prune

from vitprune import BlockPruning, compact, prune
from vitprune.dense import unwatched


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


def test_patches_that_leave_a_rest():
    dense = VisionTransformer(img_size=30, patch_size=8, embed_dim=48, depth=1, num_heads=3).eval()
    images = torch.randn(2, 3, 30, 30)
    torch.testing.assert_close(prune(dense, blocks=BlockPruning()).eval()(images), dense(images))


@pytest.mark.parametrize("share", [1.0, 0.4], ids=["all", "masked"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_see_every_module(register, share):
    """Faster calls than a module's own are for modules that nobody watches."""
    dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3).eval()
    found = []
    for model in (dense, prune(dense, blocks=BlockPruning(share, share, granularity=16)).eval()):
        seen = set()
        leaves = [name for name, module in model.named_modules() if not any(module.children())]
        for name in (name for name in leaves if not name.endswith(("q_norm", "k_norm", "attn.norm", "mlp.norm"))):  # nothing
            getattr(model.get_submodule(name), register)(lambda *_, name=name: seen.add(name) and None)  # noqa: B023
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        found.append(seen)
    assert found[0] == found[1] and len(found[0]) > 20


def double(module, how):
    if how == "hook":
        module.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        module.forward = lambda *args, own=module.forward, **options: 2 * own(*args, **options)


@pytest.mark.parametrize("name", ["norm", "patch_embed.proj", "blocks.0.norm1", "blocks.0.ls1", "blocks.0.norm2", "blocks.0.mlp.fc2",
                                  "blocks.0.drop_path1", "blocks.0.attn", "blocks.0.mlp", "blocks.0.ls2", "blocks.0"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ["hook", "forward"])
def test_a_hook_may_change_what_its_module_gives(how, grad, name):
    """And so may a forward in place of its own."""
    dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, init_values=0.1).eval()
    images, pruned = torch.randn(2, 3, 32, 32), prune(dense, blocks=BlockPruning()).eval()
    with torch.set_grad_enabled(grad):
        before = dense(images)
        for model in (dense, pruned):
            double(model.get_submodule(name), how)
        assert not torch.allclose(dense(images), before)
        torch.testing.assert_close(pruned(images), dense(images))


class Adapter(nn.Module):
    """A linear layer with a low-rank term beside it, whose weight and bias are the layer's, as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.out_features, self.in_features = base, base.out_features, base.in_features
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def replace_forward(layer):
    layer.forward = lambda x, before=layer.forward: 3 * before(x)


WRAPS = {"forward": lambda parent, name: replace_forward(getattr(parent, name)),
         "adapter": lambda parent, name: setattr(parent, name, Adapter(getattr(parent, name))),
         "weight_norm": lambda parent, name: nn.utils.weight_norm(getattr(parent, name)).weight_g.data.mul_(1.5),
         "parametrized": lambda parent, name: nn.utils.parametrizations.weight_norm(getattr(parent, name)),
         "pruned by torch": lambda parent, name: torch_prune.l1_unstructured(getattr(parent, name), "weight", 0.5)}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("at", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_wraps_a_layer_counts_where_units_are_masked(wrap, at):
    """Beside timm's model with the same change, of which hooks zero the dead heads and hidden units."""
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=4).double().eval()
    pruned, x = prune(dense, blocks=BlockPruning(0.5, 0.5, granularity=32)).eval(), torch.randn(2, 3, 32, 32).double()
    block, parent, name = pruned.blocks[0], *at.split(".")
    for model in (dense, pruned):
        torch.manual_seed(1)
        before = model(x)
        WRAPS[wrap](model.blocks[0].get_submodule(parent), name)
        model.double()
    for layer, live, width in ((dense.blocks[0].attn.proj, block.attn.live, 16), (dense.blocks[0].mlp.fc2, block.mlp.live, 32)):
        mask = torch.zeros(layer.in_features // width, width)
        mask[live.long()] = 1
        mask = mask.flatten()
        layer.register_forward_pre_hook(lambda module, args, mask=mask: args[0] * mask)
    torch.testing.assert_close(pruned(x), dense(x), rtol=1e-9, atol=1e-9)
    assert wrap == "parametrized" or not torch.allclose(pruned(x), before)
    loss = [torch.autograd.grad(m(x).square().sum(), list(m.blocks[0].get_submodule(at).parameters())) for m in (pruned, dense)]
    for ours, theirs in zip(*loss, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    if wrap in ("adapter", "parametrized"):  # the others PyTorch itself does not copy
        with pytest.raises(ValueError, match="compact: layers that lose units must be plain"):
            compact(pruned)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_another_activation_counts(share):
    dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=4).eval()
    pruned, x = prune(dense, blocks=BlockPruning(1.0, share, granularity=32)).eval(), torch.randn(2, 3, 32, 32)
    small = compact(pruned)
    for model in (pruned, small):
        model.blocks[0].mlp.act = nn.ReLU()
    torch.testing.assert_close(pruned(x), small(x))
    dense.blocks[0].mlp.act = nn.ReLU()
    assert share < 1 or torch.allclose(pruned(x), dense(x), atol=1e-5)


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


def test_a_graph_from_before_is_not_that_of_unwatched():
    """Inside hooks of masked layers are not called; whoever compiled the model before sees the same."""
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=3, num_classes=5).eval()
    model, x = prune(dense, blocks=BlockPruning(0.5, 0.5)), torch.randn(2, 3, 16, 16)
    model.blocks[0].attn.qkv.register_forward_hook(lambda layer, args, out: 2 * out)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        outside = model(x)
        torch.testing.assert_close(compiled(x), outside)
        with unwatched():
            inside = model(x)
            torch.testing.assert_close(compiled(x), inside)
    assert (inside - outside).abs().max() > 1e-3
