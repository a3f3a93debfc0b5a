import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from kernel_checks import ARCHS, INTERPRETED, SHARED, compile_launch, counts, explore, kernels, layout, record
from oracles import check_operator, within_twice
from timm.models import VisionTransformer

import vitprune
from vitprune import ops
from vitprune.ops import backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("shape", [(2, 3, 8), (8,), (0, 8)])
def test_formula(shape):
    x, (weight, bias) = torch.randn(shape, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    centred = x.numpy() - x.numpy().mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(ops.layer_norm(x, weight, bias, 1e-6).numpy(), normal * weight.numpy() + bias.numpy(), atol=1e-12)
    np.testing.assert_allclose(ops.layer_norm(x, weight, None, 1e-6).numpy(), normal * weight.numpy(), atol=1e-12)


def test_registered():
    check_operator(torch.ops.vitprune.layer_norm.default, [torch.randn(2, 3, 8), torch.randn(8), None, 1e-5, "reference"], ())


@st.composite
def cases(draw, real: bool):
    C = draw(st.sampled_from((192, 384, 768)))
    shape = (draw(st.integers(2, 3)), draw(st.integers(64, 260)), C) if real else (
        draw(st.integers(0, 4)), draw(st.integers(1, 32)), draw(st.sampled_from((1, 48, 64, 100, 257))))
    return {"shape": shape, "bias": draw(st.booleans()),
            "dtype": draw(st.sampled_from(DTYPES)), "vectors": draw(st.sampled_from(DTYPES)), "scale": draw(st.sampled_from((1, 100))),
            "seed": draw(st.integers(0, 2 ** 31))}


def check(case, name, device):
    generator = torch.Generator().manual_seed(case["seed"])
    C = case["shape"][-1]
    x = case["scale"] * torch.randn(case["shape"], generator=generator) + case["scale"]
    x = layout(x.to(case["dtype"]).to(device), np.random.default_rng(case["seed"]))
    weight, bias = (torch.randn(C, generator=generator).to(case["vectors"]).to(device) for _ in range(2))
    bias = bias if case["bias"] else None
    with torch.inference_mode(), backend(name):
        got = ops.layer_norm(x, weight, bias, 1e-6)
    wide = [t if t is None else t.double() for t in (x, weight, bias)]
    same = [t if t is None else t.to(case["dtype"]) for t in (weight, bias)]
    assert got.shape == x.shape and got.dtype == x.dtype and got.is_contiguous()
    within_twice(got, ops.layer_norm(x, *same, 1e-6), ops.layer_norm(*wide, 1e-6))


def describe(case):
    return [str(case["dtype"]), f"C={case['shape'][-1]}"] + ["bias"] * case["bias"]


@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("name, device", kernels("triton"))
def test_kernel(name, device, count):
    explore(lambda case: check(case, name, device), cases(False), cases(True), count, describe)


@pytest.mark.parametrize("name, device", kernels("triton"))
def test_kernel_registered(name, device):
    x, weight = torch.randn(2, 3, 8, device=device), torch.randn(8, device=device)
    for bias in (weight, None):
        check_operator(torch.ops.vitprune.layer_norm.default, [x, weight, bias, 1e-5, name])


@pytest.mark.parametrize("name, device", kernels("triton"))
def test_triton_refuses(name, device):
    x, w = torch.randn(2, 8, device=device), torch.ones(8, device=device)
    with backend(name):
        with pytest.raises(RuntimeError, match="forward only"):
            ops.layer_norm(x, w, None, 1e-6)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="autocast computes LayerNorm in float32"), \
                torch.autocast(torch.device(device).type, torch.bfloat16):
            ops.layer_norm(x, w, None, 1e-6)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="no kernel for torch.float64"):
            ops.layer_norm(x.double(), w, None, 1e-6)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="more channels than the 4096"):
            ops.layer_norm(x.new_zeros(1, 5000), w.new_ones(5000), None, 1e-6)


@pytest.mark.parametrize("name, device", kernels("triton"))
def test_a_forced_backend_leaves_models_to_their_norms(name, device):
    """Where a gradient may be asked for, or autocast wants float32, this operator has no say."""
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    model, images = vitprune.prune(dense, tokens=vitprune.TokenPruning(0.5, at=(1,))).to(device).eval(), torch.randn(2, 3, 16, 16)
    images = images.to(device)
    plain = model(images)
    with backend(name):
        torch.testing.assert_close(model(images), plain, rtol=1e-3, atol=1e-3)
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
            torch.testing.assert_close(model(images).float(), plain, rtol=0.1, atol=0.1)
        with torch.inference_mode():
            torch.testing.assert_close(model(images), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [384, 768, 4096])
def test_triton_compiles(C, dtype, arch, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import layer_norm as kernel
    monkeypatch.setattr(kernel.configs, "capability", lambda device: arch)
    x, weight = torch.empty(8, 197, C, dtype=dtype), torch.empty(C, dtype=dtype)
    launch, = record(monkeypatch, kernel, lambda: kernel.launch(x, weight, weight, 1e-6))
    built = compile_launch(*launch, arch)
    assert built["spills"] == 0 and built["shared"] <= SHARED[arch]
