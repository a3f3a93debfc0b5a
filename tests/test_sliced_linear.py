"""sliced_linear: the masked dense layer, forward and gradients, in every backend."""
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
from oracles import check_operator, within_twice_unless_lucky

from vitprune import native, ops

pytestmark = pytest.mark.usefixtures("poison")


def inputs(live, side):
    torch.manual_seed(0)
    w, b = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    x = torch.randn(2, 3, 6 if side == "out" else 2 * len(live), dtype=torch.float64)
    return x, w if side == "out" else torch.randn(8, 8, dtype=torch.float64), b, torch.tensor(live, dtype=torch.int32)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("live", [[], [1], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_masked_dense_layer(side, live, bias):
    x, w, b, ids = inputs(live, side)
    b = b if bias else None
    units = [2 * i + j for i in live for j in range(2)]
    got = ops.sliced_linear(x, w, b, ids, side=side, width=2)
    offset = 0 if b is None else b.numpy()
    if side == "out":
        expected = (x.numpy() @ w.numpy().T + offset)[..., units]
    else:
        full = np.zeros((2, 3, 8))
        full[..., units] = x.numpy()
        expected = full @ w.numpy().T + offset
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("side", ["in", "out"])
def test_registered(side):
    x, w, b, live = inputs([0, 3], side)
    op = torch.ops.vitprune.sliced_linear.default
    check_operator(op, [x, w, b, live, side, 2, "reference"], (0, 1, 2))
    check_operator(op, [x, w, None, live, side, 2, "reference"], (0, 1))


@pytest.mark.parametrize("side", ["in", "out"])
def test_dead_weights_get_exactly_zero(side):
    x, w, b, live = inputs([0, 3], side)
    w.requires_grad_()
    ops.sliced_linear(x, w, b, live, side=side, width=2).square().sum().backward()
    dead = w.grad[2:6] if side == "out" else w.grad[:, 2:6]
    assert not dead.any() and w.grad.abs().sum() > 0


@st.composite
def cases(draw, real: bool):
    width = 64 if real else draw(st.sampled_from((16, 32, 48)))
    blocks = 3 if real else draw(st.integers(1, 4))
    live = draw(st.permutations(range(blocks)))[:draw(st.integers(1, blocks)) if draw(st.integers(0, 7)) else 0]
    batch = 2 if real else draw(st.integers(0, 3))  # of 3 heads
    shape = (batch, draw(st.integers(64, 260)) if real else draw(st.integers(0, 40)))
    return {"shape": shape, "other": 192 if real else draw(st.integers(1, 50)), "width": width, "blocks": blocks, "live": live,
            "side": draw(st.sampled_from(("in", "out"))), "bias": draw(st.booleans()), "real": real,
            "tiles": draw(st.sampled_from(product_tiles(real))),
            "dtype": draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))), "seed": draw(st.integers(0, 2 ** 32 - 1))}


def describe(case):
    return [str(case["dtype"]), case["side"], f"width={case['width']}", f"live={len(case['live'])}/{case['blocks']}",
            f"tiles={case['tiles']}", *(k for k in ("bias", "real") if case[k])]


def tensors_of(case, device):
    """([x, w, b], live, gradient of the output)"""
    rng, out = np.random.default_rng(case["seed"]), case["side"] == "out"

    def random(*shape, vary=True):
        t = torch.from_numpy(rng.standard_normal(shape)).to(device, case["dtype"])
        return layout(t, rng) if vary else t
    full, kept = case["blocks"] * case["width"], len(case["live"]) * case["width"]
    w, other = random(full, case["other"]) if out else random(case["other"], full), case["other"]
    live = torch.tensor(case["live"], dtype=torch.int32, device=device)
    bias = random(w.shape[0], vary=False) if case["bias"] else None
    return [random(*case["shape"], other if out else kept), w, bias], live, random(*case["shape"], kept if out else other)


def run(name, tensors, live, up, case, cast=lambda t: t):
    """The output and every gradient."""
    leaves = [t if t is None else cast(t).detach().requires_grad_() for t in tensors]
    with ops.backend(name):
        y = ops.sliced_linear(*leaves, live, side=case["side"], width=case["width"])
    wanted = [t for t in leaves if t is not None]
    return y.detach(), *torch.autograd.grad(y, wanted, cast(up))


def explored(name, device, count):
    lucky = []

    def check(case):
        tensors, live, up = tensors_of(case, device)
        with tiled("sliced_linear", PRODUCTS[case["tiles"]]):
            got = run(name, tensors, live, up, case)
        plain = run("reference", tensors, live, up, case)
        for a, b, c in zip(got, plain, run("reference", tensors, live, up, case, torch.Tensor.double), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            lucky.append(within_twice_unless_lucky(a, b, c))
        units = [u for u in range(case["blocks"] * case["width"]) if u // case["width"] not in case["live"]]
        assert not got[2].index_select(0 if case["side"] == "out" else 1, torch.tensor(units, device=device, dtype=torch.long)).any()
    explore(check, cases(False), cases(True), count, describe)
    print("outputs and gradients beyond twice the error:", sum(lucky), "of", len(lucky))
    assert sum(lucky) <= 3 * len(lucky) // 100


@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("device", DEVICES)
def test_triton(device, count):
    explored("triton", device, count)


@pytest.mark.parametrize("name, device", CUDA)
def test_bias_of_another_dtype_is_refused(name, device):
    x, w = torch.randn(3, 32, device=device).half(), torch.randn(32, 32, device=device).half()
    with ops.backend(name), pytest.raises(ValueError, match="^sliced_linear: b must be torch.float16 as x, got torch.float32$"):
        ops.sliced_linear(x, w, torch.zeros(32, device=device), torch.tensor([0], dtype=torch.int32, device=device), side="out", width=16)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name, device", CUDA)
def test_cuda(name, device, count):
    explored(name, device, count)


@pytest.mark.parametrize("name, device", CUDA)
def test_cuda_large_tiles(name, device, monkeypatch):
    """Where tensor cores have enough tiles for every multiprocessor these are large; edges in rows, columns and depth."""
    monkeypatch.setattr(native, "processors", lambda index: 2)
    for dtype in (torch.float16, torch.bfloat16):
        for side in ("out", "in"):
            case = {"shape": (1, 150), "other": 136, "width": 48, "blocks": 5, "live": [4, 0, 2], "side": side, "bias": True,
                    "dtype": dtype, "seed": 1}
            tensors, live, up = tensors_of(case, device)
            truth = run("reference", tensors, live, up, case, torch.Tensor.double)
            for a, b, c in zip(run(name, tensors, live, up, case), run("reference", tensors, live, up, case), truth, strict=True):
                within_twice_unless_lucky(a, b, c)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["in", "out"])
def test_triton_configurations_and_determinism(side, device):
    """Every configuration that may be timed computes the same, and twice the same bits."""
    from vitprune.kernels import sliced_linear as triton
    case = {"shape": (1, 150), "other": 96, "width": 32, "blocks": 4, "live": [2, 0, 3], "side": side, "bias": True, "dtype": torch.float16,
            "seed": 0}
    (x, w, b), live, up = tensors_of(case, device)
    truth = run("reference", [x, w, b], live, up, case, torch.Tensor.double)
    for arch in (75, 90):
        for config in triton.candidates(torch.float16, arch, M=150, C=96, L=96):
            got, again = ((triton.launch(x, w, b, live, side, 32, config), *triton.launch_backward(up, x, w, live, side, 32, config))
                          for _ in range(2))
            for a, same, c in zip(got, again, truth, strict=True):
                assert torch.equal(a, same)
                torch.testing.assert_close(a.double(), c, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("name, device", [("reference", "cpu"), *kernels("triton")])
def test_gradients_that_nobody_asked_for_are_left_out(name, device):
    """In the shapes and strides that a compiler was promised, whatever those of the input."""
    case = {"shape": (3, 5), "other": 24, "width": 16, "blocks": 3, "live": [2, 0], "bias": True, "dtype": torch.float32, "seed": 0}
    for side in ("out", "in"):
        (x, w, b), live, up = tensors_of(case | {"side": side}, device)
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        op, whole = torch.ops.vitprune.sliced_linear_backward.default, None
        for of_x, of_w in ((True, True), (True, False), (False, True)):
            args = (up, x, w, live, side, 16, of_x, of_w, name)
            torch.library.opcheck(op, args)
            found = op(*args)
            whole = whole or found
            for got, full, asked in zip(found, whole, (of_x, of_w, of_w), strict=True):
                assert torch.equal(got, full) if asked else got.numel() == 0
        for wanted in ((0,), (1,), (2,)):  # one of x, w and b
            leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, w, b))]
            with ops.backend(name):
                ops.sliced_linear(*leaves, live, side=side, width=16).backward(up)
            for i, (leaf, full) in enumerate(zip(leaves, whole)):
                assert (leaf.grad is None) == (i not in wanted)
                assert leaf.grad is None or torch.allclose(leaf.grad, full, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_triton_is_registered(device):
    case = {"shape": (2, 3), "other": 5, "width": 16, "blocks": 3, "live": [2, 0], "bias": True, "dtype": torch.float32, "seed": 0}
    for side in ("out", "in"):
        (x, w, b), live, _ = tensors_of(case | {"side": side}, device)
        check_operator(torch.ops.vitprune.sliced_linear.default, [t.requires_grad_() for t in (x, w, b)] + [live, side, 16, "triton"])
    with pytest.raises(RuntimeError, match="no kernel for blocks of width 8: a multiple of 16 is needed"), ops.backend("triton"):
        ops.sliced_linear(x[..., :8], w[:, :8], b, live[1:], side="in", width=8)
    with pytest.raises(ValueError, match="sliced_linear: w must be torch.float32 as x, got torch.float16"), ops.backend("triton"):
        ops.sliced_linear(x, w.half(), b, live, side="in", width=16)


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", [arch if arch in (75, 90) else pytest.param(arch, marks=pytest.mark.long) for arch in ARCHS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("batch", [8, 32])
def test_triton_compiles(batch, side, dtype, arch, monkeypatch):
    """DeiT-S, half of its heads: no spills, tensor cores where there are some."""
    triton = pytest.importorskip("vitprune.kernels.sliced_linear")
    from vitprune.kernels import sliced_product, sliced_product_large
    out = side == "out"
    with torch.device("meta"):
        live, w, b = torch.arange(3, dtype=torch.int32), torch.empty(384, 384, dtype=dtype), torch.empty(384, dtype=dtype)
        x, up = (torch.empty(batch, 197, C, dtype=dtype) for C in ((384, 192) if out else (192, 384)))
    monkeypatch.setattr(triton.configs, "capability", lambda device: arch)

    def call():
        triton.launch(x, w, b, live, side, 64)
        triton.launch_backward(up, x, w, live, side, 64)
    for kernel, args, options in record(monkeypatch, (sliced_product, sliced_product_large), call):
        built = compile_launch(kernel, args, options, arch)
        assert built["spills"] == 0 and built["shared"] <= SHARED[arch]
        if kernel is sliced_product.product_kernel and dtype != torch.float32 and arch >= 80:
            assert "wgmma" in built["ptx"] if arch == 90 and options["ROWS"] >= 64 else "mma" in built["ptx"]
