import importlib

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitprune
from vitprune import ops
from vitprune.layers import PrunedMlp
from vitprune.ops import registry


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("end", ["", "gelu", "residual"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 197, 48), (3, 48), (0, 5, 48)])
def test_formula(dtype, end, bias, shape):
    torch.manual_seed(0)
    x, w, b = torch.randn(shape).to(dtype), torch.randn(32, 48).to(dtype) / 7, torch.randn(32).to(dtype)
    truth = x.double() @ w.double().t() + (b.double() if bias else 0)
    residual = torch.randn(*shape[:-1], 32).to(dtype) if end == "residual" else None
    if end == "gelu":
        truth = truth * 0.5 * (1 + torch.erf(truth / 2 ** 0.5))
    elif end == "residual":
        truth = truth + residual.double()
    with torch.no_grad():
        out = ops.linear(x, w, b if bias else None, gelu=end == "gelu", residual=residual)
    assert out.dtype == dtype and out.shape == truth.shape
    assert torch.allclose(out.double(), truth, atol=16 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_processors_without_bfloat16_products(monkeypatch):
    """AVX2 alone: oneDNN refuses, PyTorch's own call serves."""
    linear = importlib.import_module("vitprune.ops.linear")
    monkeypatch.setattr(linear, "_bfloat16", lambda: False)
    x, w, b = (torch.randn(shape).bfloat16() for shape in ((3, 48), (32, 48), 32))
    with torch.no_grad():
        assert torch.equal(ops.linear(x, w, b), nn.functional.linear(x, w, b)) and linear.pack(w, 3) is None


def test_gradient_flows_where_asked():
    x, w = torch.randn(2, 8, requires_grad=True), torch.randn(4, 8)
    ops.linear(x, w, None, gelu=True).sum().backward()
    assert x.grad.abs().sum() > 0


def test_hooks_and_replaced_layers_are_honoured():
    mlp, seen = PrunedMlp(8, 16).eval(), []
    mlp.act.register_forward_hook(lambda *_: seen.append("act"))
    mlp.fc2 = nn.Sequential(mlp.fc2)
    with torch.no_grad():
        out = mlp(torch.ones(1, 2, 8))
        expected = mlp.fc2(nn.functional.gelu(mlp.fc1(torch.ones(1, 2, 8))))
    assert seen == ["act"] and torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("change, one", [
    (lambda mlp: None, True), (lambda mlp: mlp.act.register_forward_hook(lambda *_: None), False),
    (lambda mlp: mlp.drop1.register_forward_pre_hook(lambda *_: None), False), (lambda mlp: setattr(mlp.drop1, "p", 0.5), False),
    (lambda mlp: setattr(mlp, "fc2", nn.Sequential(mlp.fc2)), False), (lambda mlp: setattr(mlp, "drop1", nn.Identity()), True),
    (lambda mlp: setattr(mlp, "drop1", nn.Sequential()), False), (lambda mlp: setattr(mlp, "act", nn.ReLU()), False),
    (lambda mlp: setattr(mlp.fc1, "forward", mlp.fc1.forward), False), (lambda mlp: mlp.set_live([0], width=8), True)])
def test_off_the_cpu_the_mlp_is_one_operator_where_nobody_looks_inside(change, one):
    mlp = PrunedMlp(8, 16, device="meta")
    change(mlp)
    with registry.watch() as asked:
        assert mlp(torch.ones(2, 3, 8, device="meta"), torch.ones(2, 3, 8, device="meta")).shape == (2, 3, 8)
    assert ("sliced_mlp" in {op for op, *_ in asked}) == one


@pytest.mark.parametrize("residual", [False, True])
def test_counted(residual):
    x, w, r = torch.randn(2, 5, 48), torch.randn(32, 48), torch.randn(2, 5, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ops.linear(x, w, None, residual=r if residual else None)
    assert counter.get_total_flops() == 2 * 2 * 5 * 48 * 32


def test_hook_on_the_mlp_sees_its_output_alone():
    dense = timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32).eval()
    model = vitprune.prune(dense, blocks=vitprune.BlockPruning(hidden=0.5))
    block, seen, x = model.blocks[0].eval(), [], torch.randn(1, 5, 192)
    with torch.no_grad():
        fused = block(x)
        block.mlp.register_forward_hook(lambda module, args, out: seen.append((args, out)))
        watched = block(x)
        (args, out), = seen
        assert len(args) == 1 and torch.allclose(block.mlp(args[0]), out)
    assert torch.allclose(fused, watched, atol=1e-6)


@pytest.mark.parametrize("gelu", [False, True])
def test_tangents_reach_through_frozen_weights(gelu):
    x, tangent = torch.randn(3, 16), torch.randn(3, 16)
    plain = nn.Sequential(nn.Linear(16, 8), nn.GELU() if gelu else nn.Identity()).requires_grad_(False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(torch.func.jvp(lambda x: ops.linear(x, *plain[0].parameters(), gelu=gelu), (x,), (tangent,))[1],
                                       torch.func.jvp(plain, (x,), (tangent,))[1])
