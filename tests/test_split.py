"""The backward pass over kept tokens alone: its gradients are those of the whole one."""
import warnings
from dataclasses import replace

import pytest
import torch
from test_train import CONFIG, loaders
from test_train import vit as small
from test_vit import VARIANTS, vit
from timm.layers import DropPath
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from vitprune import BlockPruning, PrunedBlock, TokenPruning, prune
from vitprune import vit as vit_module
from vitprune.split import DroppedGradient, Split
from vitprune.step import Run
from vitprune.train import train


def pruned(blocks=None, **options):
    model = prune(vit(**options), TokenPruning(0.7, at=(1, 2, 3)), blocks).train()
    for predictor in model.score_predictor:
        predictor.out_conv[4].bias.data.copy_(torch.tensor([0.7, 0.3]).log())
    return model


def step(model, sparse, dtype=torch.float64, loss=lambda out: (out.features * out.keep[..., None]).square().mean()):
    """Output and gradient of every parameter."""
    model.to(dtype).zero_grad()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.manual_seed(2)
    out = model(images, details=True, sparse_backward=sparse)
    (out.logits.square().sum() + loss(out) + sum(d.mean() for d in out.decisions)).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= tolerance * grad.norm() + 1e-12, name


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_the_whole_pass(name):
    model = pruned(**VARIANTS[name])
    expected, full = step(model, False)
    out, sparse = step(model, True)
    torch.testing.assert_close(out.features, expected.features, rtol=1e-12, atol=1e-12)  # of dropped tokens too
    assert torch.equal(out.keep, expected.keep) and 0.2 < out.keep.mean() < 0.8
    assert any(not torch.equal(sparse[n], full[n]) for n in full)  # it took the other path
    assert_same(sparse, full, 1e-6)


@pytest.mark.parametrize("blocks", [BlockPruning(heads=[1, 0.5, 1, 0.25], hidden=[0, 0.25, 0.5, 1]), BlockPruning(heads=0.5, hidden=0.5,
                                    method="movement"), BlockPruning(heads=0.5, hidden=0.5, method="gates")])
def test_with_blocks_pruned_and_learned(blocks):
    model = pruned(blocks)
    assert_same(step(model, True)[1], step(model, False)[1], 1e-6)


def test_distilled():
    torch.manual_seed(0)
    dense = VisionTransformerDistilled(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=5)
    model = prune(dense, TokenPruning(0.6, at=(1, 2, 3))).train()
    assert_same(step(model, True)[1], step(model, False)[1], 1e-6)


def test_autocast_gives_every_weight_its_gradient():
    model = pruned().float()
    with torch.autocast("cpu", torch.bfloat16):
        got, full = step(model, True, torch.float32)[1], step(model, False, torch.float32)[1]
    assert_same(got, full, 0.1)
    assert all(grad.norm() > 0 for name, grad in got.items() if "qkv.bias" not in name)


class Twice(PrunedBlock):
    def forward(self, x, *args, **options):
        return 2 * super().forward(x, *args, **options)


class Mixing(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + x.mean(1, keepdim=True)


def other(name, change):
    """Changes that part of the third block."""
    return lambda m: change(m.blocks[2].get_submodule(name))


@pytest.mark.parametrize("change", [
    lambda m: m.set_grad_checkpointing(), lambda m: m.blocks[2].attn.set_live([]), other("mlp.drop1", lambda d: setattr(d, "p", 0.5)),
    lambda m: setattr(m.blocks[2], "drop_path1", DropPath(0.5)), lambda m: setattr(m.blocks[2].mlp, "drop1", nn.AlphaDropout(0.2)),
    other("", lambda b: b.register_forward_hook(lambda *_: None)),
    other("mlp.fc1", lambda f: f.register_full_backward_hook(lambda *_: None)),
    other("", lambda b: setattr(b, "__class__", Twice)), other("norm1", lambda n: setattr(n, "__class__", Mixing)),
    other("attn", lambda a: setattr(a, "forward", lambda x, *_, **__: x)),
    lambda m: m.blocks[2].compile(backend="eager"), lambda m: m.blocks.__setitem__(2, torch.compile(m.blocks[2], backend="eager")),
    lambda m: m.blocks.__setitem__(2, checkpoint_wrapper(m.blocks[2]))])
def test_what_it_does_not_serve_runs_as_ever(change):
    model = pruned()
    change(model)
    (_, sparse), (_, full) = step(model, True), step(model, False)
    assert all(torch.equal(sparse[name], full[name]) for name in full)


def test_global_hooks_see_every_block():
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        step(pruned(), True)
    assert seen.count(PrunedBlock) == 4


def test_transforms_and_second_derivatives():
    model = pruned().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = dict(model.named_parameters())

    def loss(weights):
        return torch.func.functional_call(model, weights, (images,), {"sparse_backward": True}).square().sum()
    torch.manual_seed(2)
    got = torch.func.grad(loss)(weights)
    torch.manual_seed(2)
    expected = torch.autograd.grad(loss(weights), list(weights.values()), allow_unused=True)
    expected = {name: grad for name, grad in zip(weights, expected) if grad is not None}
    assert_same({name: got[name] for name in expected}, expected, 1e-6)
    with pytest.raises(RuntimeError, match="with sparse_backward there is no second derivative"):
        torch.autograd.grad(loss(weights), weights["blocks.0.mlp.fc1.weight"], create_graph=True)


def test_evaluation_is_as_ever():
    model, images = pruned().eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images, sparse_backward=True), model(images))


@pytest.mark.parametrize("stage", [None, 1, 2])
def test_a_loss_on_dropped_tokens_is_refused(stage):
    """Of their features in the end, or of what a predictor makes of them."""
    model, seen = pruned(), []
    if stage is not None:
        model.score_predictor[stage].register_forward_hook(lambda module, args, out: seen.append(out))
    with pytest.raises(DroppedGradient, match="with sparse_backward dropped tokens must have no gradient, but theirs is"):
        step(model, True, loss=lambda out: out.features.sum() if stage is None else seen[0].exp().square().sum())


def sharp(model):
    """Attention so sharp that dropped keys are far above kept ones, and eps counts."""
    for block in model.blocks:
        block.attn.qkv.weight.data[:2 * block.attn.attn_dim] *= 6
    return model


def test_attention_that_lets_dropped_tokens_through_is_refused():
    assert_same(step(pruned(), True)[1], step(pruned(), False)[1], 1e-6)
    with pytest.raises(DroppedGradient, match="or attention is so sharp that its eps counts"):
        step(sharp(pruned()), True)


def test_what_is_not_finite_spreads_as_ever():
    """An overflow of dropped tokens alone must reach the weights, where a scaler looks for it, and is no loss that reads them."""
    model = pruned(global_pool="avg")
    for sparse in (True, False):
        _, grads = step(model, sparse, loss=lambda out: (out.features * out.keep[..., None] * torch.inf).sum())
        assert not grads["blocks.0.mlp.fc1.weight"].isfinite().all()


def test_a_norm_that_overflows_is_no_harm():
    def huge(out):
        return 1e25 * (out.features * out.keep[..., None]).sum()
    model = pruned()
    (_, sparse), (_, full) = (step(model, sparse, torch.float32, huge) for sparse in (True, False))
    assert_same(sparse, full, 1e-3)
    assert all(grad.isfinite().all() for grad in sparse.values())


def test_only_where_enough_is_dropped(monkeypatch):
    model, images = pruned().float(), torch.randn(2, 3, 32, 32)
    parts = []
    monkeypatch.setattr(PrunedBlock, "forward_split", lambda self, kept, dropped, *_: parts.append(len(kept)) or (kept, dropped))

    def calls(least, sparse=None):
        parts.clear()
        monkeypatch.setattr(vit_module, "SPARSE_PAYS", least)
        torch.manual_seed(2)
        model(images, sparse_backward=sparse)
        return len(parts)
    assert calls((0, 0.0)) == calls((10 ** 9, 1.0), True) == 3 and calls((10 ** 9, 0.0)) == calls((0, 1.0)) == calls((0, 0.0), False) == 0
    assert calls((0, 0.4)) == 2  # the first stage drops 0.3
    with pytest.raises(ValueError, match="PrunedViT: sparse_backward must be a bool or None, got 'auto'"):
        model(images, sparse_backward="auto")


def test_saves_less_for_the_backward_pass():
    def saved(sparse):
        model, sizes = pruned(), {}
        weights = {p.data_ptr() for p in model.parameters()}

        def keep(t):
            if t.data_ptr() not in weights:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            step(model, sparse, torch.float32)
        return sum(sizes.values())
    assert saved(True) < 0.9 * saved(False)


def test_rows_go_where_they_came_from():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    for policy in (torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 0, 1]]), torch.ones(2, 5), torch.zeros(2, 5)):
        split = Split(policy)
        kept, dropped = split.part(x)
        assert torch.equal(split.join(kept, dropped), x) and not dropped.requires_grad
        grad, = torch.autograd.grad(split.join(kept, dropped, leak=torch.inf).sum(), x)
        assert torch.equal(grad, (policy[..., None] > 0).expand(2, 5, 3).double())


def trained(sparse, change=lambda model: model, **options):
    model = change(prune(small(), TokenPruning(0.7, at=(1, 2, 3)), BlockPruning(heads=0.5)))
    train(model, loaders(), replace(CONFIG, sparse_backward=sparse, **options), small())
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_trainer_takes_the_same_steps(monkeypatch):
    full, sparse = trained(False), trained(True)
    assert torch.equal(trained(None), full) and not torch.equal(full, sparse)  # too small a model to gain
    monkeypatch.setattr(vit_module, "SPARSE_PAYS", (1, 0.0))
    assert torch.equal(trained(None), sparse)
    torch.testing.assert_close(sparse, full, rtol=1e-3, atol=1e-4)


def sharper(model):
    for block in model.blocks:
        block.attn.qkv.weight.data[:2 * block.attn.attn_dim] *= 300
    return model


@pytest.mark.parametrize("options", [{}, {"mixup": 0.8}, {"cutmix": 1.0}, {"ema": 0.9, "smoothing": 0.0}])
def test_the_trainer_repeats_a_step_with_all_gradients(options):
    with pytest.warns(UserWarning, match="dropped tokens have gradients that sparse_backward must not leave out"):
        sparse = trained(True, sharper, **options)
    assert torch.equal(sparse, trained(False, sharper, **options))


def test_a_run_goes_on_as_it_was_stopped():
    """Whether all gradients are needed is part of a checkpoint, what is asked for is not."""
    def run(sparse):
        return Run(sharper(prune(small(), TokenPruning(0.7, at=(1, 2, 3)))), replace(CONFIG, sparse_backward=sparse), 4, small())
    first, images, labels = run(True), *next(iter(loaders()[0].at_epoch(0)))
    with pytest.warns(UserWarning, match="repeated with all"):
        first.step(0, images, labels)
    state = first.state_dict()
    second = run(True)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(first.step(1, images, labels), second.step(1, images, labels))  # not tried in vain
    assert second.full
    del state["full"]  # of a run that began before there was such a thing
    second.load_state_dict(state)
    assert not second.full
