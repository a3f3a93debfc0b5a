"""sliced_mlp: the masked dense MLP, forward and gradients, in every backend."""
import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from kernel_checks import (
    ARCHS,
    CUDA,
    DEVICES,
    INTERPRETED,
    PRODUCTS,
    SHARED,
    compile_launch,
    counts,
    explore,
    kernels,
    layout,
    product_tiles,
    record,
    tiled,
)
from oracles import check_operator, gelu, within_twice, within_twice_unless_lucky

from vitprune import ops

pytestmark = pytest.mark.usefixtures("poison")


def inputs():
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (8, 5), (8,), (5, 8), (5,)]
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("live", [[], [2], [0, 3], [0, 1, 2, 3], None])
@pytest.mark.parametrize("residual", [True, False])
def test_is_the_masked_dense_mlp(live, residual):
    x, w1, b1, w2, b2 = inputs()
    mask = np.zeros(8)
    mask[[2 * i + j for i in (range(4) if live is None else live) for j in range(2)]] = 1
    hidden = gelu(x.numpy() @ w1.numpy().T + b1.numpy()) * mask
    expected = hidden @ w2.numpy().T + b2.numpy() + (x.numpy() if residual else 0)
    live = live if live is None else torch.tensor(live, dtype=torch.int32)
    got = ops.sliced_mlp(x, w1, b1, w2, b2, live, width=2, residual=x if residual else None)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


def test_registered():
    x, w1, b1, w2, b2 = inputs()
    live, op = torch.tensor([0, 3], dtype=torch.int32), torch.ops.vitprune.sliced_mlp.default
    check_operator(op, [x, w1, b1, w2, b2, live, torch.randn_like(x), 2, "reference"], (0, 1, 2, 3, 4, 6))
    check_operator(op, [x, w1, None, w2, None, live, None, 2, "reference"], (0, 1, 3))
    check_operator(op, [x, w1, b1, w2, b2, None, None, 64, "reference"], (0, 1, 2, 3, 4))


def test_dead_units_get_exactly_zero():
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in inputs())
    ops.sliced_mlp(x, w1, b1, w2, b2, torch.tensor([0, 3], dtype=torch.int32), width=2).square().sum().backward()
    assert not w1.grad[2:6].any() and not b1.grad[2:6].any() and not w2.grad[:, 2:6].any()
    assert w1.grad[:2].all() and w2.grad[:, 6:].all()


@st.composite
def cases(draw, real: bool):
    blocks = 4 if real else draw(st.integers(1, 4))
    count = draw(st.sampled_from((None, 0, *6 * (-1,))))  # all, none, or some
    live = None if count is None else draw(st.permutations(range(blocks)))[:draw(st.integers(1, blocks)) if count else 0]
    heads, shape = draw(st.sampled_from((1, 2))), (draw(st.integers(0, 3)), draw(st.integers(0, 40)))
    shape = (4 // heads, draw(st.integers(64, 260))) if real else shape
    return {"shape": shape, "C": 64 * heads if real else draw(st.integers(1, 50)), "blocks": blocks, "live": live,
            "width": 64 if real else draw(st.sampled_from((16, 32, 48))), "real": real,
            "b1": draw(st.booleans()), "b2": draw(st.booleans()), "residual": draw(st.booleans()),
            "tiles": draw(st.sampled_from(product_tiles(real))),
            "dtype": draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))), "seed": draw(st.integers(0, 2 ** 32 - 1))}


def describe(case):
    return [str(case["dtype"]), f"width={case['width']}", f"tiles={case['tiles']}",
            "dense" if case["live"] is None else f"live={len(case['live'])}/{case['blocks']}",
            *(k for k in ("b1", "b2", "residual", "real") if case[k])]


def tensors_of(case, device):
    """([x, w1, b1, w2, b2, residual], live, gradient of the output); weights of a deviation that leaves the GELU in its bend."""
    rng, hidden, C = np.random.default_rng(case["seed"]), case["blocks"] * case["width"], case["C"]

    def random(*shape, scale=1.0, vary=True):
        t = torch.from_numpy(scale * rng.standard_normal(shape)).to(device, case["dtype"])
        return layout(t, rng) if vary else t
    x, up = random(*case["shape"], C), random(*case["shape"], C)
    w1, w2 = random(hidden, C, scale=C ** -0.5), random(C, hidden, scale=hidden ** -0.5)
    b1, b2 = random(hidden, vary=False) if case["b1"] else None, random(C, vary=False) if case["b2"] else None
    residual = random(*case["shape"], C) if case["residual"] else None
    live = None if case["live"] is None else torch.tensor(case["live"], dtype=torch.int32, device=device)
    return [x, w1, b1, w2, b2, residual], live, up


def run(name, tensors, live, up, width, cast=lambda t: t):
    """The output and every gradient."""
    leaves = [t if t is None else cast(t).detach().requires_grad_() for t in tensors]
    with ops.backend(name):
        y = ops.sliced_mlp(*leaves[:5], live, width=width, residual=leaves[5])
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], cast(up), materialize_grads=True)


def explored(name, device, count):
    lucky = []

    def check(case):
        tensors, live, up = tensors_of(case, device)
        with tiled("sliced_linear", PRODUCTS[case["tiles"]]):  # which has the choice for both operators
            got = run(name, tensors, live, up, case["width"])
        plain = run("reference", tensors, live, up, case["width"])
        for a, b, c in zip(got, plain, run("reference", tensors, live, up, case["width"], torch.Tensor.double), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            lucky.append(within_twice_unless_lucky(a, b, c))
        dead = torch.tensor([u for u in range(case["blocks"] * case["width"])
                             if case["live"] is not None and u // case["width"] not in case["live"]],
                            device=device, dtype=torch.long)
        assert not got[2].index_select(0, dead).any() and not got[4 if case["b1"] else 3].index_select(1, dead).any()
    explore(check, cases(False), cases(True), count, describe)
    print("outputs and gradients beyond twice the error:", sum(lucky), "of", len(lucky))
    assert sum(lucky) <= 3 * len(lucky) // 100


@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("device", DEVICES)
def test_triton(device, count):
    explored("triton", device, count)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name, device", CUDA)
def test_cuda(name, device, count):
    explored(name, device, count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("live", [[4, 0, 2], None])
@pytest.mark.parametrize("device", DEVICES)
def test_many_rows(device, live, dtype, monkeypatch):
    """What TILES have of it by chance: tensor descriptors in every product that can take them; tiles that end past every edge."""
    from vitprune.kernels import sliced_product_large as large
    made, describe = [], large.TensorDescriptor.from_tensor
    monkeypatch.setattr(large.TensorDescriptor, "from_tensor", lambda *args: made.append(args) or describe(*args))
    rng = np.random.default_rng(1)
    x, w1, b1, w2, b2, residual, up = (torch.from_numpy(rng.standard_normal(shape) * scale).to(device, dtype) for shape, scale in (
        ((2, 75, 200), 1), ((320, 200), 200 ** -0.5), (320, 1), ((200, 320), 320 ** -0.5), (200, 1), ((2, 75, 200), 1), ((2, 75, 200), 1)))
    live, tensors = live if live is None else torch.tensor(live, dtype=torch.int32, device=device), [x, w1, b1, w2, b2, residual]
    with tiled("sliced_linear", PRODUCTS[-1]):
        got = run("triton", tensors, live, up, 64)
    assert len(made) == 3 + 4 + 4  # up; down with the residual; the gradient of the GELU
    plain, truth = (run("reference", tensors, live, up, 64, cast) for cast in (lambda t: t, torch.Tensor.double))
    for a, b, c in zip(got, plain, truth, strict=True):
        within_twice(a, b, c)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_no_whole_16_bytes(device):
    """Views into padded buffers have strides for descriptors; what is gathered from them has none."""
    rng = np.random.default_rng(2)
    x, w1, residual, up = (torch.from_numpy(rng.standard_normal(shape)).to(device, torch.float16)[..., :100]
                           for shape in ((2, 40, 104), (192, 104), (2, 40, 104), (2, 40, 104)))
    w1, w2 = w1.div_(10), torch.from_numpy(rng.standard_normal((100, 192)) / 10).to(device, torch.float16)
    live, tensors = torch.tensor([2, 0], dtype=torch.int32, device=device), [x, w1, None, w2, None, residual]
    with tiled("sliced_linear", PRODUCTS[-1]):
        got = run("triton", tensors, live, up, 64)
    plain, truth = (run("reference", tensors, live, up, 64, cast) for cast in (lambda t: t, torch.Tensor.double))
    for a, b, c in zip(got, plain, truth, strict=True):
        within_twice(a, b, c)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_of_columns(device):
    from vitprune.kernels.sliced_product_large import column_sums
    torch.manual_seed(0)
    for shape in ((5000, 300), (3, 5)):
        t = torch.randn(shape, device=device).bfloat16()
        torch.testing.assert_close(column_sums(t).double(), t.double().sum(0), rtol=1e-2 if shape[0] < 10 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("shape, C, width, blocks, live", [
    ((0, 197), 64, 64, 4, [1]), ((1, 0), 64, 64, 4, [1]), ((257, 1), 16, 16, 2, [1]), ((2, 15), 24, 64, 24, [3, 0, 23]),
    ((1, 16), 48, 64, 48, [47, 1]), ((1, 130), 48, 100, 1, None), ((1, 17), 40, 64, 48, []),
    ((1, 50), 33, 128, 12, [11, 5]), ((1, 198), 32, 16, 96, [95, 0, 7])])
@pytest.mark.parametrize("name, device", kernels("triton") + CUDA)
def test_edges(name, device, shape, C, width, blocks, live):
    """Nothing, one, many images and tokens; hidden layers of DeiT-S and DeiT-B, and none of them alive."""
    case = {"shape": shape, "C": C, "width": width, "blocks": blocks, "live": live, "b1": True, "b2": True, "residual": True,
            "dtype": torch.float32, "seed": 3}
    tensors, live, up = tensors_of(case, device)
    for a, b in zip(run(name, tensors, live, up, width), run("reference", tensors, live, up, width, torch.Tensor.double), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * (1 + float(b.abs().max()) if b.numel() else 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name, device", kernels("triton") + CUDA)
def test_gelu_from_end_to_end(name, device, dtype):
    """Through identities: every part of the GELU and of its derivative, far tails and what is not finite."""
    x = torch.cat([torch.linspace(-12, 12, 1003), torch.tensor([0.0, 6.0, -6.0, -1e4, 6e4])]).to(device, dtype)[:, None]
    one, live = torch.eye(16, dtype=dtype, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    wide = x.expand(-1, 16).clone().requires_grad_()
    true = x.expand(-1, 16).double().requires_grad_()
    with ops.backend(name):
        y = ops.sliced_mlp(wide, one, None, one, None, live, width=16)
    expected = torch.nn.functional.gelu(true)
    for got, truth in ((y, expected), (torch.autograd.grad(y.sum(), wide)[0], torch.autograd.grad(expected.sum(), true)[0])):
        assert ((got.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-6).all()
    with ops.backend(name):
        lost = ops.sliced_mlp(x.new_tensor([[math.nan], [math.inf]]).expand(2, 16), one, None, one, None, live, width=16)
    assert lost.isnan().all()  # infinity times the other units' zeros


@pytest.mark.parametrize("name, device", [("reference", "cpu"), *kernels("triton")])
@pytest.mark.parametrize("live", [[2, 0], None])
def test_gradients_that_nobody_asked_for_are_left_out(name, device, live):
    """In the shapes and strides that a compiler was promised, whatever those of the input."""
    case = {"shape": (2, 3), "C": 8, "width": 16, "blocks": 3, "live": live, "b1": True, "b2": True, "residual": True,
            "dtype": torch.float32, "seed": 0}
    (x, w1, b1, w2, b2, residual), live, up = tensors_of(case, device)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    op, whole = torch.ops.vitprune.sliced_mlp_backward.default, None
    for of_x, of_w in ((True, True), (True, False), (False, True)):
        args = (up, x, w1, b1, w2, live, 16, of_x, of_w, name)
        torch.library.opcheck(op, args)
        found = op(*args)
        whole = whole or found
        for got, full, asked in zip(found, whole, (of_x, *4 * (of_w,)), strict=True):
            assert torch.equal(got, full) if asked else got.numel() == 0
    for wanted in range(6):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, w1, b1, w2, b2, residual))]
        with ops.backend(name):
            ops.sliced_mlp(*leaves[:5], live, width=16, residual=leaves[5]).backward(up)
        for i, (leaf, full) in enumerate(zip(leaves, (*whole, up))):
            assert (leaf.grad is None) == (i != wanted)
            assert leaf.grad is None or torch.allclose(leaf.grad, full, atol=1e-5)


@pytest.mark.parametrize("name, device", kernels("triton") + CUDA)
def test_what_overflows_is_infinite(name, device):
    w, live = torch.eye(32, device=device), torch.tensor([0], dtype=torch.int32, device=device)
    for value in (math.inf, 3e38):
        x = torch.full((2, 32), value, device=device)
        with ops.backend(name):
            assert (ops.sliced_linear(x, torch.ones_like(w), None, live, side="out", width=16) == math.inf).all()


@pytest.mark.parametrize("device", DEVICES)
def test_triton_is_registered(device):
    case = {"shape": (2, 3), "C": 8, "width": 16, "blocks": 3, "live": [2, 0], "b1": True, "b2": True, "residual": True,
            "dtype": torch.float32, "seed": 0}
    (x, w1, b1, w2, b2, r), live, up = tensors_of(case, device)
    args = [t.requires_grad_() for t in (x, w1, b1, w2, b2)] + [live, r.requires_grad_(), 16, "triton"]
    check_operator(torch.ops.vitprune.sliced_mlp.default, args)
    with ops.backend("triton"), pytest.raises(ValueError, match="sliced_mlp: w2 must be torch.float32 as x, got torch.float16"):
        ops.sliced_mlp(x, w1, b1, w2.half(), b2, live, width=16)


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=[pytest.mark.interpreter, pytest.mark.skipif(
    not INTERPRETED, reason="TRITON_INTERPRET=1")])])
def test_the_residual_keeps_its_precision(name):
    """Under autocast the products are of bfloat16, the stream they are added to stays float32."""
    x, w1, b1, w2, b2 = (t.float() for t in inputs())
    big, live = torch.full_like(x, 2.0 ** 12 + 0.25), torch.arange(1, dtype=torch.int32)
    w1, w2, b1 = torch.randn(16, 5), torch.zeros(5, 16), torch.randn(16)
    with ops.backend(name), torch.autocast("cpu", torch.bfloat16):
        y = ops.sliced_mlp(x, w1, b1, w2, b2, live, width=16, residual=big)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, big + b2.bfloat16().float(), rtol=0, atol=1e-3)


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", [arch if arch in (75, 90) else pytest.param(arch, marks=pytest.mark.long) for arch in ARCHS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 32])
def test_triton_compiles(batch, dtype, arch, monkeypatch):
    """DeiT-B, half of its hidden blocks: no spills, tensor cores where there are some."""
    triton = pytest.importorskip("vitprune.kernels.sliced_mlp")
    from vitprune.kernels import sliced_linear, sliced_product, sliced_product_large
    with torch.device("meta"):
        live, x = torch.arange(0, 48, 2, dtype=torch.int32), torch.empty(batch, 197, 768, dtype=dtype)
        w1, b1, w2, b2 = (torch.empty(s, dtype=dtype) for s in ((3072, 768), 3072, (768, 3072), 768))
    monkeypatch.setattr(sliced_linear.configs, "capability", lambda device: arch)

    def call():
        triton.launch(x, w1, b1, w2, b2, live, x, 64)
        triton.launch(x, w1, b1, w2, b2, None, x, 64)
        triton.launch(x, w1, b1, w2, b2, live[:5], x, 64)  # an odd number: the last tile of columns is not full
        triton.launch_backward(x, x, w1, b1, w2, live, 64)
    launches = record(monkeypatch, (sliced_product, sliced_product_large), call)
    large = arch == 90 and batch == 32 and dtype != torch.float32
    assert (sliced_product_large.descriptor_kernel in [kernel for kernel, *_ in launches]) == large
    for kernel, args, options in launches:
        built = compile_launch(kernel, args, options, arch)
        assert built["spills"] == 0 and built["shared"] <= SHARED[arch]
        if kernel in (sliced_product.product_kernel, sliced_product_large.descriptor_kernel) and dtype != torch.float32 and arch >= 80:
            assert "cp.async.ca" not in built["ptx"]  # small copies: the ids of live blocks as a stage of the pipeline
            assert "wgmma" in built["ptx"] if arch == 90 and options["ROWS"] >= 64 else "mma" in built["ptx"]
