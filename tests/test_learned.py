import copy

import pytest
import torch
from kernel_checks import INTERPRETED
from timm.models.vision_transformer import VisionTransformer

import vitprune
from vitprune import learned, ops
from vitprune.blocks import BlockPruning, parse_spec
from vitprune.layers import PrunedAttention, PrunedMlp
from vitprune.learned import Cubic
from vitprune.step import Run
from vitprune.train import TrainConfig


def small(seed=0, **kwargs):
    torch.manual_seed(seed)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=5, **kwargs)


def images(n=4):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def learner(method="movement", **kwargs):
    return vitprune.prune(small(), blocks=BlockPruning(**{"heads": 0.5, "hidden": 0.5, "granularity": 16, "method": method} | kwargs))


def test_cubic_schedule_is_nn_prunings():
    schedule, steps, target = Cubic(0.1, 0.3), 1000, 0.2
    for t in range(steps + 1):
        if t <= 100:
            expected = 1.0
        elif t > 700:
            expected = target
        else:
            expected = target + (1 - target) * (1 - (t - 100) / 600) ** 3
        assert schedule.density(t / steps, target) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", ["movement", "gates"])
def test_open_gates_change_nothing(method):
    model = learner(method).eval()
    with torch.no_grad():
        assert torch.allclose(model(images()), small().eval()(images()), atol=1e-6)


@pytest.mark.parametrize("kind", ["head", "hidden", "dims"])
def test_movement_gradient_is_the_sum_of_weight_times_its_gradient(kind):
    """Checked against a model whose weights are masked by hand: dL/dS = sum over the unit of dL/dW' * W."""
    model = learner(head_dim=0.5).double()
    block = model.blocks[1]
    D = block.attn.head_dim
    block.attn.head_gate.mask[2] = 0      # dead units get a gradient too
    block.mlp.hidden_gate.mask[3] = 0
    block.attn.dim_gate.mask[1, 1, 5] = 0
    model(images().double()).square().sum().backward()

    plain = small().double()
    other = plain.blocks[1]
    masked = {"proj": other.attn.proj.weight.detach().clone(), "fc2": other.mlp.fc2.weight.detach().clone()}
    masked["proj"][:, 2 * D:3 * D] = 0
    masked["proj"][:, D + 5] = 0
    masked["fc2"][:, 48:64] = 0
    full = {"proj": other.attn.proj.weight.detach().clone(), "fc2": other.mlp.fc2.weight.detach().clone()}
    with torch.no_grad():
        other.attn.proj.weight.copy_(masked["proj"])
        other.mlp.fc2.weight.copy_(masked["fc2"])
    plain(images().double()).square().sum().backward()
    if kind == "head":  # a dimension that is dead itself does not move the score of its head
        movement = (other.attn.proj.weight.grad * full["proj"])
        movement[:, D + 5] = 0
        assert torch.allclose(block.attn.head_gate.score.grad, movement.sum(0).view(4, D).sum(1), rtol=1e-9)
    elif kind == "hidden":
        movement = (other.mlp.fc2.weight.grad * full["fc2"]).sum(0).view(-1, 16).sum(1)
        assert movement[3] != 0 and torch.allclose(block.mlp.hidden_gate.score.grad, movement, rtol=1e-9)
    else:
        movement = (other.attn.proj.weight.grad * full["proj"]).sum(0).view(4, D)
        live = block.attn.head_gate.mask.bool()
        assert torch.allclose(block.attn.dim_gate.score.grad[1][live], movement[live], rtol=1e-9)


def train_a_little(model, steps=12, lr=0.1):
    model.train()
    target = torch.randint(5, (8,), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        learned.advance(model, step / steps)
        loss = torch.nn.functional.cross_entropy(model(images(8)), target) + learned.penalty(model, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("options", [
    {}, {"method": "gates", "regulariser": 0.1}, {"head_dim": 0.5}, {"method": "gates", "head_dim": 0.25},
    {"heads": (0.25, 0.5, 1), "hidden": (1, 0.25, 0.5)}, {"heads": 1.0, "hidden": 1.0, "budget": 0.6},
    {"heads": 1.0, "hidden": 1.0, "threshold": 0.5, "regulariser": 1.0}])
def test_settles_and_compacts_to_the_same_outputs(options, tmp_path):
    model = train_a_little(learner(**options))
    learned.advance(model, 1.0)
    with torch.no_grad():
        gated = model(images())
        settled = copy.deepcopy(model)
        learned.settle(settled)
        compacted = vitprune.compact(model)
        assert settled.learning is None and not learned.gates(settled) and model.learning is not None
        assert torch.allclose(settled(images()), gated, atol=1e-5) and torch.allclose(compacted(images()), gated, atol=1e-5)
        for one in (settled, compacted):
            vitprune.save(one, tmp_path)
            assert torch.equal(vitprune.load(tmp_path)(images()), one(images()))
    counts = [(b.attn.num_heads, b.attn.head_dim, b.mlp.fc1.out_features) for b in compacted.blocks]
    if options.get("heads", 0.5) == 0.5:
        assert counts == [(2, int(8 * options.get("head_dim", 1)), 64)] * 3
    assert sum(p.numel() for p in compacted.parameters()) < sum(p.numel() for p in small().parameters())


def test_dead_block_comes_back_while_the_schedule_runs():
    model = learner()
    gate = model.blocks[0].mlp.hidden_gate
    with torch.no_grad():
        gate.score.copy_(torch.arange(8.0))
    learned.advance(model, 0.5)
    assert gate.mask[0] == 0
    with torch.no_grad():
        gate.score[0] = 100
    learned.advance(model, 0.6)
    assert gate.mask[0] == 1


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=[pytest.mark.interpreter, pytest.mark.skipif(
    not INTERPRETED, reason="TRITON_INTERPRET=1")])])
def test_live_units_train_as_their_gates_would(name, monkeypatch):
    """50 steps of movement pruning, half of them after the choice: scores, masks, losses and weights as with gates to the end."""
    steps = 50
    pictures = torch.randn(steps, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (steps, 2), generator=torch.Generator().manual_seed(1))

    def once(backend):
        torch.manual_seed(0)
        dense = VisionTransformer(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)
        blocks = BlockPruning(heads=0.5, hidden=0.5, granularity=16, method="movement", schedule=Cubic(0.1, 0.5), start="zero")
        model, seen = vitprune.prune(dense, blocks=blocks), []
        run = Run(model, TrainConfig(epochs=1, warmup_epochs=0, lr=1e-3, score_lr=1e-2, backbone_lr_scale=1.0, backbone_frozen_epochs=0,
                                     clip_grad=None), steps)
        with ops.backend(backend):
            for step in range(steps):
                seen.append(run.step(step, pictures[step], labels[step]))
        sliced = [b.mlp.live is not None and b.attn.live is not None for b in model.blocks]
        return torch.stack(seen), [(g.score.detach().clone(), g.mask.clone()) for g in learned.gates(model)], model.state_dict(), sliced

    losses, gates, weights, sliced = once(name)
    assert all(sliced)
    for cls in (PrunedAttention, PrunedMlp):  # the masked reference: nothing is ever sliced
        monkeypatch.setattr(cls, "set_live", lambda self, live, width=16: [
            self.register_buffer(name, None, persistent=False) for name in ("live", "live_qkv")])
    expected, expected_gates, expected_weights, sliced = once("reference")
    assert not any(sliced)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for (score, mask), (expected_score, expected_mask) in zip(gates, expected_gates, strict=True):
        assert torch.equal(mask, expected_mask) and 0 < mask.sum() < len(mask)
        torch.testing.assert_close(score, expected_score, rtol=1e-4, atol=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(value, expected_weights[key], rtol=1e-3, atol=1e-4)


def test_density_follows_the_schedule():
    model, seen = learner(), []
    for progress in (0, 0.1, 0.3, 0.5, 0.7, 1):
        learned.advance(model, progress)
        seen.append(int(model.blocks[0].mlp.hidden_gate.mask.sum()))
        assert seen[-1] == int(8 * model.learning.schedule.density(progress, 0.5) + 1e-9)
    assert seen[0] == 8 and seen[-1] == 4 and seen == sorted(seen, reverse=True)


def test_penalty_by_hand():
    model = learner("gates", regulariser=0.3)
    with torch.no_grad():
        for i, gate in enumerate(learned.gates(model)):
            gate.score.fill_(-0.5 * i)
    heads = [0.5 * i for i in (0, 2, 4)]
    hidden = [0.5 * i for i in (1, 3, 5)]
    expected = 0.3 * model.learning.schedule.density(0.5, 0.5) / 0.5 * (sum(heads) / 3 + sum(hidden) / 3) / 2
    assert learned.penalty(model, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_scores_start_from_the_mean_square_of_their_gradients():
    """Against gradients taken by hand; what is not finite counts nothing, and nothing is gathered once units leave."""
    model, squares = learner(schedule=Cubic(0.2, 0.2)), None
    for step in range(3):
        model.zero_grad()
        model(images()[step:step + 2]).square().sum().backward()
        grads = [gate.score.grad.clone() for gate in learned.gates(model)]
        if step == 1:
            learned.gates(model)[0].score.grad[2], grads[0][2] = float("inf"), 0
        squares = [g ** 2 + (0 if squares is None else old) for g, old in zip(grads, squares or grads)]
        learned.observe(model, 0.1 * step)
    mean = torch.cat([s.flatten() for s in squares]).mean()
    for gate, square in zip(learned.gates(model), squares):
        torch.testing.assert_close(gate.score.detach(), square / mean, rtol=1e-5, atol=0)
    before = [gate.score.detach().clone() for gate in learned.gates(model)]
    learned.observe(model, 0.3)
    assert all(torch.equal(gate.score, b) for gate, b in zip(learned.gates(model), before))


@pytest.mark.parametrize("kwargs", [{"start": "zero"}, {"heads": 1.0, "hidden": 1.0, "threshold": 0.5}, {"method": "gates"}])
def test_scores_that_start_from_a_constant(kwargs):
    model = learner(**kwargs)
    before = learned.gates(model)[0].score.detach().clone()
    model(images()).square().sum().backward()
    learned.observe(model, 0.0)
    assert torch.equal(learned.gates(model)[0].score, before)


def test_threshold_lowers_scores_until_units_leave():
    model = train_a_little(learner(heads=1.0, hidden=1.0, threshold=0.5, regulariser=50.0), steps=30)
    live = vitprune.compact(model)
    assert sum(b.mlp.fc1.out_features for b in live.blocks) < 3 * 128


def test_refill_revives_dimensions_of_surviving_heads():
    model = vitprune.prune(small(), blocks=BlockPruning(heads=0.5, granularity=16, head_dim=0.5)).eval()
    kept = model.blocks[0].attn.proj.weight.detach().clone()
    dims = model.blocks[0].attn.dims
    learned.refill(model, torch.Generator().manual_seed(0))
    live = torch.zeros(4, 8).scatter(-1, dims[1], 1).bool().flatten()
    now = model.blocks[0].attn.proj.weight.detach()
    assert model.blocks[0].attn.dims is None and torch.equal(now[:, live], kept[:, live])
    assert now[:, ~live].std() < 0.05 * kept.std() and vitprune.compact(model).blocks[0].attn.head_dim == 8
    with pytest.raises(ValueError, match="still learning"):
        learned.refill(learner())


def test_edge_vision_transformer_string():
    text = "-".join(["h_0.5_d_0.4"] * 2 + ["h_1_d_0.9"])
    assert parse_spec(text) == ((0.5, 0.5, 1.0), (0.4, 0.4, 0.9))
    model = vitprune.compact(vitprune.prune(small(), blocks=BlockPruning(heads=text, granularity=1)))
    assert [b.attn.num_heads for b in model.blocks] == [2, 2, 4]
    assert [b.mlp.fc1.out_features for b in model.blocks] == [51, 51, 115]
    with pytest.raises(ValueError, match="heads must be 'h_FRACTION"):
        BlockPruning(heads="h_0.5")


@pytest.mark.parametrize("options, message", [
    ({"method": "movement", "threshold": 0.1, "heads": 0.5}, "threshold must be None where heads"),
    ({"method": "gates", "threshold": 0.1}, "threshold must be None for method='gates'"),
    ({"regulariser": 0.1}, "regulariser must be 0 for method='magnitude'"), ({"head_dim": 0.0}, r"head_dim must be in \(0, 1\]"),
    ({"schedule": {"initial": 0.5, "final": 0.5}}, "initial and final must be >= 0 and together < 1")])
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        BlockPruning(**options)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="still learning"):
        vitprune.save(learner(), tmp_path)
    with pytest.raises(ValueError, match="head_dim must be 1 where queries and keys are normalised"):
        vitprune.prune(small(qk_norm=True), blocks=BlockPruning(head_dim=0.5, granularity=16))
    with pytest.raises(ValueError, match="budget must be reachable"):  # before the first step, not when the schedule gets there
        vitprune.prune(small(), blocks=BlockPruning(method="movement", budget=0.01, granularity=16))


def test_with_tokens_in_training_and_evaluation():
    tokens = vitprune.TokenPruning([8, 4], at=(1, 2))
    model = vitprune.prune(learner(), tokens=tokens)
    model = train_a_little(model, lr=0.01)
    learned.advance(model, 1.0)
    with torch.no_grad():
        assert torch.allclose(vitprune.compact(model)(images()), model(images()), atol=1e-5)
