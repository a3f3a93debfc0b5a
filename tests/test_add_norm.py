import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from kernel_checks import ARCHS, CUDA, INTERPRETED, SHARED, compile_launch, counts, explore, kernels, layout, record, tiled
from oracles import check_operator, within_twice

from vitprune import ops
from vitprune.ops import backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = [*kernels("triton"), *CUDA]
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 8), (0, 8)])
def test_formula(scaled, shape):
    torch.manual_seed(0)
    x, r = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weight, bias, gamma = torch.randn(3, 8, dtype=torch.float64)
    s, y = ops.add_norm(x, r, weight, bias, 1e-6, gamma=gamma if scaled else None)
    expected = x.numpy() + r.numpy() * (gamma.numpy() if scaled else 1)
    np.testing.assert_allclose(s.numpy(), expected, atol=1e-14)
    centred = expected - expected.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y.numpy(), normal * weight.numpy() + bias.numpy(), atol=1e-12)


def test_registered():
    x, r = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    weight, bias, gamma = torch.randn(3, 8, dtype=torch.float64)
    op = torch.ops.vitprune.add_norm.default
    check_operator(op, [x, r, weight, bias, gamma, 1e-5, "reference"], (0, 1, 2, 3, 4))
    check_operator(op, [x, r, weight, None, None, 1e-5, "reference"], (0, 1, 2))
    for like, scale in ((x.new_empty(0), None), (torch.empty(0), None), (r, gamma)):
        torch.library.opcheck(torch.ops.vitprune.add_norm_backward.default, (x, r, x + r, like, weight, scale, 1e-5, "reference"))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_dynamic_channels(dynamic):
    compiled = torch.compile(lambda x, w: ops.add_norm(x, x, w, None, 1e-6)[1], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for C in (8, 16, 40):
        x, w = torch.randn(2, 3, C), torch.ones(C)
        torch.testing.assert_close(compiled(x, w), ops.add_norm(x, x, w, None, 1e-6)[1])


def run(name, tensors, ups, eps, convert=lambda t: t):
    """Outputs and every gradient of a backend, on converted copies of (x, residual, weight, bias or None, gamma or None)."""
    leaves = [t if t is None else convert(t).detach().requires_grad_() for t in tensors]
    with backend(name):
        out = ops.add_norm(*leaves[:4], eps, gamma=leaves[4])
    return *out, *torch.autograd.grad(out, [t for t in leaves if t is not None], [convert(u) for u in ups])


@pytest.mark.parametrize("name, device", [("reference", "cpu"), *KERNELS])
def test_residual_is_read_for_gamma_alone(name, device):
    """Without gamma its gradient is x's and it is not kept for the backward pass; both leaves own what they are given."""
    x, r = (torch.randn(2, 3, 16, device=device, requires_grad=True) for _ in range(2))
    gamma, kept = torch.ones(16, device=device), []
    for scale in (None, gamma):
        before = len(kept)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = torch.ops.vitprune.add_norm(x, r, gamma, None, scale, 1e-6, name)  # as registered: plain PyTorch keeps what it keeps
        out[1].square().sum().backward()
        assert len(kept[before:]) == (3 if scale is None else 4) and kept[before:].count(x.numel()) == (1 if scale is None else 2)
        torch.testing.assert_close(x.grad, r.grad)
        assert x.grad.data_ptr() != r.grad.data_ptr()
        x.grad = r.grad = None


@st.composite
def cases(draw, real: bool):
    B, C = draw(st.sampled_from(((2, 192), (1, 384), (2, 384))))
    shape = (B, draw(st.integers(64, 260)), C) if real else (
        draw(st.integers(1, 4)), draw(st.integers(1, 32)), draw(st.sampled_from((48, 64, 100, 192, 257))))
    return {"shape": shape, "dtype": draw(st.sampled_from(DTYPES)), "bias": draw(st.booleans()), "gamma": draw(st.booleans()),
            "eps": draw(st.sampled_from((1e-6, 1e-5, 1e-2))), "real": real,
            # few rows a program take longest to interpret
            "tile": {"rows": 16, "backward_rows": 8, "programs": 16} if real and INTERPRETED and draw(st.integers(0, 3)) else {},
            "seed": draw(st.integers(0, 2 ** 32 - 1))}


def describe(case):
    return [str(case["dtype"]), f"C={case['shape'][2]}", *(k for k in ("bias", "gamma", "real") if case[k])]


def tensors_of(case, device):
    rng = np.random.default_rng(case["seed"])

    def random(*shape, vary=True):
        t = torch.from_numpy(rng.standard_normal(shape)).to(device, case["dtype"])
        return layout(t, rng) if vary else t
    shape, C = case["shape"], case["shape"][2]
    vectors = [random(C, vary=False) if on else None for on in (True, case["bias"], case["gamma"])]
    return [random(*shape), random(*shape), *vectors], [random(*shape), random(*shape)]


def check(case, name, device, lucky):
    tensors, ups = tensors_of(case, device)
    with tiled("add_norm", case["tile"]):
        got, plain = (run(kind, tensors, ups, case["eps"]) for kind in (name, "reference"))
    truth = run("reference", tensors, ups, case["eps"], torch.Tensor.double)
    for a, b, c in zip(got, plain, truth):
        assert a.dtype == b.dtype and a.shape == b.shape
        try:
            within_twice(a, b, c)
        except AssertionError:  # of a few values the reference may round every one luckily: count on no less than rounding can cost
            lucky.append(case)
            unit = c.abs().max().log2().floor().exp2() * torch.finfo(b.dtype).eps  # half for the result, half for the sum it starts from
            if b.dim() == 1 and b.dtype == torch.float32:  # a sum over rows, rounded at every level of a tree
                unit *= max(1.0, math.log2(case["shape"][0] * case["shape"][1]) / 2)
            within_twice(a, c + unit, c)


@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("name, device", KERNELS)
def test_kernel(name, device, count):
    lucky = []
    explore(lambda case: check(case, name, device, lucky), cases(False), cases(True), count, describe)
    print("cases where the reference erred by less than half of what rounding alone may cost:", len(lucky))
    assert len(lucky) <= count // 20


@pytest.mark.parametrize("name, device", KERNELS)
def test_kernel_edges(name, device):
    """Sizes at and around tiles, empty ones included; constant rows; a bad row that stays alone."""
    torch.manual_seed(0)
    for shape in [(0, 5, 8), (2, 0, 8), (2, 3, 0), (1,), (3, 1), (16, 2), (1, 15, 16), (2, 17, 17), (1, 2, 768), (1, 1, 1025), (1, 2, 4096),
                  (2, 1, 3, 64), (8,), (257, 1, 3)]:
        C = shape[-1]
        tensors = [torch.randn(s, device=device) for s in (shape, shape, C, C, C)]
        ups = [torch.randn(shape, device=device) for _ in range(2)]
        got = run(name, tensors, ups, 1e-2)
        for a, b in zip(got, run("reference", tensors, ups, 1e-2, torch.Tensor.double)):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    constant = torch.ones(4, 8, device=device)
    for out in run(name, [constant, constant, constant[0], None, None], [constant, constant], 1e-6)[1:]:
        assert out.isfinite().all()
    spoilt = torch.randn(5, 8, device=device)
    spoilt[2] = float("nan")
    with backend(name):
        y = ops.add_norm(spoilt, constant[:1].expand(5, 8), constant[0], None, 1e-6)[1]
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("name, device", KERNELS)
def test_kernel_mixed_dtypes_and_refusals(name, device):
    x, r, w = torch.randn(2, 5, 16, device=device).half(), torch.randn(2, 5, 16, device=device), torch.randn(16, device=device)
    got, plain = (run(kind, [x, r, w, w, w], [r, r], 1e-5) for kind in (name, "reference"))
    for a, b in zip(got, plain):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with backend(name):
        with pytest.raises(RuntimeError, match="no kernel for torch.float64"):
            ops.add_norm(r.double(), r, w, None, 1e-5)
        with pytest.raises(RuntimeError, match="more channels than the 4096"):
            ops.add_norm(r.new_ones(1, 5000), r.new_ones(1, 5000), r.new_ones(5000), None, 1e-5)


@pytest.mark.parametrize("name, device", KERNELS)
def test_kernel_registered_and_deterministic(name, device):
    torch.manual_seed(0)
    tensors = [torch.randn(s, device=device) for s in ((2, 3, 8), (2, 3, 8), 8, 8, 8)]
    ups = [torch.randn(2, 3, 8, device=device) for _ in range(2)]
    op = torch.ops.vitprune.add_norm.default
    torch.library.opcheck(op, tuple(t.clone().requires_grad_() for t in tensors) + (1e-5, name))
    torch.library.opcheck(op, (*(t.clone().requires_grad_() for t in tensors[:3]), None, None, 1e-5, name))
    first = run(name, tensors, ups, 1e-5)
    for a, b in zip(first, run(name, tensors, ups, 1e-5)):
        assert torch.equal(a, b)
    with backend(name):
        compiled = torch.compile(lambda x, r, w, b, g: ops.add_norm(x, r, w, b, 1e-5, gamma=g), fullgraph=True, backend="aot_eager")
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = compiled(*leaves)
        for a, b in zip(first, (*out, *torch.autograd.grad(out, leaves, ups))):
            assert torch.equal(a, b)


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", [a if a in (75, 80, 90, 120) else pytest.param(a, marks=pytest.mark.long) for a in ARCHS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [192, 384, 768, pytest.param(4096, marks=pytest.mark.long)])
def test_triton_compiles(C, dtype, arch, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import add_norm as kernel
    monkeypatch.setattr(kernel.configs, "capability", lambda device: arch)
    x, w = torch.empty(8, 197, C, dtype=dtype), torch.empty(C, dtype=dtype)
    launches = [launch for gamma in (w, None) for launch in record(monkeypatch, kernel, lambda: (
        kernel.launch(x, x, w, w, gamma, 1e-6), kernel.launch_backward(x, x, x, x, w, gamma, 1e-6)))]  # noqa: B023
    assert len(launches) == 6
    for launch in launches:
        built = compile_launch(*launch, arch)
        assert built["spills"] == 0
        assert built["shared"] <= SHARED[arch]
