"""The backward pass over kept tokens alone: its gradients are those of the whole one."""
from dataclasses import replace

import pytest
import torch
from test_train import CONFIG, loaders
from test_train import vit as small
from test_vit import VARIANTS, vit
from timm.models.deit import VisionTransformerDistilled

from vitprune import BlockPruning, TokenPruning, prune
from vitprune import vit as vit_module
from vitprune.split import Split
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


@pytest.mark.parametrize("change", [lambda m: m.set_grad_checkpointing(), lambda m: setattr(m.blocks[2].mlp.drop1, "p", 0.5),
                                    lambda m: m.blocks[2].register_forward_hook(lambda *_: None)])
def test_what_it_does_not_serve_runs_as_ever(change):
    model = pruned()
    change(model)
    (_, sparse), (_, full) = step(model, True), step(model, False)
    assert all(torch.equal(sparse[name], full[name]) for name in full)


def test_evaluation_is_as_ever():
    model, images = pruned().eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images, sparse_backward=True), model(images))


def test_a_loss_on_dropped_tokens_is_refused():
    with pytest.raises(RuntimeError, match="sparse_backward the loss must not depend on the features of dropped tokens"):
        step(pruned(), True, loss=lambda out: out.features.sum())


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
        grad, = torch.autograd.grad(split.join(kept, dropped).sum(), x)
        assert torch.equal(grad, (policy[..., None] > 0).expand(2, 5, 3).double())


def test_the_trainer_takes_the_same_steps(monkeypatch):
    def trained(sparse):
        model = prune(small(), TokenPruning(0.7, at=(1, 2, 3)), BlockPruning(heads=0.5))
        train(model, loaders(), replace(CONFIG, sparse_backward=sparse), small())
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    full, sparse = trained(False), trained(True)
    assert torch.equal(trained(None), full) and not torch.equal(full, sparse)  # too small a model to gain
    monkeypatch.setattr(vit_module, "SPARSE_PAYS", 16 * 17 * 16)
    assert torch.equal(trained(None), sparse)
    torch.testing.assert_close(sparse, full, rtol=1e-3, atol=1e-4)
