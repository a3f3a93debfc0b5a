"""The official DynamicViT implementation's outputs, on deterministic weights (tests/data/README.md)."""
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from kernel_checks import kernels
from torch.nn import functional as F

import vitprune
from vitprune import tokens as tokens_module
from vitprune.losses import DynamicViTLoss
from vitprune.ops import backend, score_tokens, softmax_with_policy
from vitprune.tokens import TokenPredictor

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))
import weights  # noqa: E402

TI, UNITS = np.load(DATA / "golden_ti.npz"), np.load(DATA / "golden_units.npz")


def golden(model, dtype):
    model = model.to(dtype)
    model.load_state_dict({k: torch.from_numpy(weights.parameter(k, tuple(v.shape))) for k, v in model.state_dict().items()})
    return model.eval()


def images(dtype):
    return torch.from_numpy(weights.tensor("image", (2, 3, 224, 224))).to(dtype)


@pytest.fixture(scope="module")
def dense():
    return timm.create_model("deit_tiny_patch16_224")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("case, keep, schedule", [("geo0.7", 0.7, "geometric"), ("sub0.4", 0.4, "subtractive")])
@torch.no_grad()
def test_evaluation(dense, dtype, tolerance, case, keep, schedule):
    model = golden(vitprune.prune(dense, vitprune.TokenPruning(keep, schedule=schedule, min_keep=0)), dtype)
    x = images(dtype)
    assert len(model.state_dict()) == 182
    assert np.abs(model(x).double().numpy() - TI[f"{case}_logits"]).max() <= tolerance
    for s, kept in enumerate(model.trace_tokens(x)):
        expected = TI[f"{case}_keep{s}"]
        assert [set(row) for row in kept.tolist()] == [set(row) for row in expected.tolist()]
        assert kept.shape[1] == model.keep_counts[s]


def test_training(dense, monkeypatch):
    model = golden(vitprune.prune(dense, vitprune.TokenPruning(0.7)), torch.float64).train()
    teacher = golden(timm.create_model("deit_tiny_patch16_224"), torch.float64)
    noise = iter([-np.log(-np.log(weights.uniform(f"gumbel{s}", 2 * 196 * 2))).reshape(2, 196, 2) for s in range(3)])
    monkeypatch.setattr(tokens_module, "gumbel_noise", lambda like: torch.from_numpy(next(noise)))
    target = torch.from_numpy(weights.uniform("target", 2000).reshape(2, 1000) ** 40)
    target = target / target.sum(1, keepdim=True)
    x = images(torch.float64)
    with torch.no_grad():
        features = teacher.forward_features(x)
        expected = teacher.forward_head(features), features[:, 1:]

    output = model(x, details=True)
    total, parts = DynamicViTLoss(model.keep_ratios, ratio_weight=2.0, distill_weight=0.5, token_weight=0.5)(output, target, expected)
    total.backward()

    assert np.abs(output.logits.detach().numpy() - TI["train_logits"]).max() <= 1e-6 * np.abs(TI["train_logits"]).max()
    assert np.array_equal(torch.stack(output.decisions).detach().numpy(), TI["train_decisions"])
    losses = [total, parts["classification"], parts["ratio"] * 3, parts["distillation"], parts["tokens"]]
    np.testing.assert_allclose([v.item() for v in losses], TI["train_loss"], rtol=1e-6)
    norms = {n: -1.0 if p.grad is None else float(p.grad.norm()) for n, p in model.named_parameters()}
    assert set(norms) == set(TI["grad_names"])
    np.testing.assert_allclose([norms[n] for n in TI["grad_names"]], TI["grad_norms"], rtol=1e-6)


@pytest.mark.parametrize("name, dtype, exact", [("f32", torch.float32, False), ("f16", torch.float16, True),
                                                ("bf16", torch.bfloat16, True)])
def test_softmax_with_policy(name, dtype, exact):
    scores = torch.from_numpy(UNITS["swp_attn"]).to(dtype).requires_grad_()
    policy = torch.from_numpy(UNITS["swp_policy"])[..., 0].to(dtype).requires_grad_()
    out = softmax_with_policy(scores, policy)
    (out * torch.from_numpy(UNITS["swp_w"]).to(dtype)).sum().backward()
    for got, key in ((out.detach(), "out"), (scores.grad, "gattn"), (policy.grad[..., None], "gpol")):
        expected = UNITS[f"swp_{name}_{key}"]
        if exact:
            assert np.array_equal(got.float().numpy(), expected), key
        else:
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_underflow_is_the_official_one():
    scores = torch.zeros(1, 1, 4, 4)
    scores[..., 3] = 30
    out = softmax_with_policy(scores, torch.tensor([[1.0, 1, 1, 0]]))
    np.testing.assert_allclose(out.numpy(), UNITS["swp_underflow_out"], atol=1e-7)


def golden_predictor(dtype):
    predictor = TokenPredictor(64).to(dtype)
    predictor.load_state_dict({k: torch.from_numpy(weights.parameter("score_predictor.0." + k, tuple(v.shape)))
                               for k, v in predictor.state_dict().items()})
    return predictor


@pytest.mark.parametrize("name, device", kernels("triton"))
@torch.no_grad()
def test_predictor_in_kernels(name, device):
    """Log-probabilities of patches whose policy is a mask."""
    x, mask = (torch.from_numpy(UNITS[f"pred_{key}"]).to(device) for key in ("x", "policy"))
    with backend(name):
        got = score_tokens(x.float(), golden_predictor(torch.float32).to(device), mask[..., 0] > 0)
    np.testing.assert_allclose(got.cpu().numpy(), UNITS["pred_out"][..., 0] - UNITS["pred_out"][..., 1], atol=5e-6)


def test_predictor():
    predictor = golden_predictor(torch.float64)
    x = torch.from_numpy(UNITS["pred_x"]).requires_grad_()
    policy = torch.from_numpy(UNITS["pred_policy"])[..., 0].requires_grad_()
    out = predictor(x, policy)
    (out * torch.from_numpy(weights.tensor("unit.pw", (2, 11, 2)))).sum().backward()
    np.testing.assert_allclose(out.detach().numpy(), UNITS["pred_out"], atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), UNITS["pred_gx"], atol=1e-12)
    np.testing.assert_allclose(policy.grad[..., None].numpy(), UNITS["pred_gpol"], atol=1e-12)
    assert torch.isfinite(predictor(x, torch.zeros_like(policy))).all()  # an image that has lost every token


def test_straight_through_gradient():
    """The sampled policy's gradient is torch's own straight-through Gumbel softmax's."""
    logp = torch.randn(2, 9, 2, dtype=torch.float64).log_softmax(-1).requires_grad_()
    weight = torch.randn(2, 9, dtype=torch.float64)
    torch.manual_seed(0)
    ours = tokens_module.sample_policy(logp, None)
    g1, = torch.autograd.grad((ours * weight).sum(), logp)
    torch.manual_seed(0)
    theirs = F.gumbel_softmax(logp, hard=True)[..., 0]
    g2, = torch.autograd.grad((theirs * weight).sum(), logp)
    assert torch.equal(ours.detach(), theirs.detach().round()) and torch.allclose(g1, g2, atol=1e-15)
