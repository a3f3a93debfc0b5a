
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from kernel_checks import ARCHS, CUDA, DEVICES, INTERPRETED, SHARED, compile_launch, counts, explore, layout, record
from oracles import check_operator

from vitprune import native, ops
from vitprune.native import compact_tokens as native_compact_tokens
from vitprune.ops import backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("shape", [(3, 6, 4), (1, 1, 1), (0, 5, 2), (2, 0, 3), (4, 7, 0)])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_rows_and_inverse(shape, density):
    torch.manual_seed(0)
    x, keep = torch.randn(shape), torch.rand(shape[:2]) < density
    rows, cu_seqlens = ops.compact_tokens(x, keep)
    assert torch.equal(rows, x[keep])
    assert cu_seqlens.tolist() == [0, *torch.cumsum(keep.sum(1), 0).tolist()] and cu_seqlens.dtype == torch.int32
    for fill in (0.0, -1.0):
        assert torch.equal(ops.expand_rows(rows, cu_seqlens, keep, fill=fill), torch.where(keep[..., None], x, fill))


def test_capacity():
    x, keep = torch.randn(2, 4, 3), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    rows, cu_seqlens = ops.compact_tokens(x, keep, capacity=5)
    assert torch.equal(rows[:3], x[keep]) and not rows[3:].any() and rows.shape == (5, 3)
    assert ops.compact_tokens(x, keep, capacity=11)[0].shape == (11, 3)
    assert torch.equal(ops.expand_rows(rows, cu_seqlens, keep), torch.where(keep[..., None], x, 0))
    with pytest.raises(RuntimeError, match="more tokens kept than capacity 2"):
        ops.compact_tokens(x, keep, capacity=2)


def test_registered():
    x, keep = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    check_operator(torch.ops.vitprune.compact_tokens.default, [x, keep, 5, "reference"], (0,))
    rows, cu_seqlens = ops.compact_tokens(x, keep)
    check_operator(torch.ops.vitprune.expand_rows.default, [rows, cu_seqlens, keep, 0.0, "reference"], (0,))


@st.composite
def cases(draw, real: bool):
    B, N = (draw(st.integers(1, 4)), draw(st.integers(64, 260))) if real else draw(st.sampled_from(
        [(b, n) for b in (0, 1, 2, 5, 16) for n in (0, 1, 2, 7, 15, 16, 17, 50) if b * n <= 256]))
    C = draw(st.sampled_from((192, 384)[B == 1:] if real else (0, 1, 3, 8, 48, 300)))  # four heads at least
    return {"shape": (B, N, C), "dtype": draw(st.sampled_from(DTYPES)),
            "density": draw(st.sampled_from((0.0, 0.3, 0.7, 1.0))), "spare": draw(st.sampled_from((None, 0, 1, 40))), "real": real,
            "fill": draw(st.sampled_from((0.0, -1.0, float("nan")))), "seed": draw(st.integers(0, 2 ** 32 - 1))}


def describe(case):
    return [str(case["dtype"]), f"keep={case['density']}", f"spare={case['spare']}", *(["real"] if case["real"] else [])]


def check(case, name, device):
    """Rows, starts, inverse and both gradients, bit for bit; dropped tokens hold NaN."""
    rng = np.random.default_rng(case["seed"])
    B, N, C = case["shape"]
    x = layout(torch.from_numpy(rng.standard_normal(case["shape"])).to(device, case["dtype"]), rng)
    keep = layout(torch.from_numpy(rng.random((B, N)) < case["density"]).to(device), rng)
    x = x.masked_fill(~keep[..., None], float("nan")) if case["seed"] % 2 else x
    kept = int(keep.sum())
    capacity = B * N if case["spare"] is None else kept + case["spare"]
    x = x.detach().requires_grad_()
    with backend(name):
        rows, cu_seqlens = ops.compact_tokens(x, keep, capacity=capacity)
        packed = layout(rows.detach(), np.random.default_rng(0 if rows.numel() else 1))
        packed = packed.requires_grad_()
        out = ops.expand_rows(packed, cu_seqlens, keep, fill=case["fill"])
    expected = x.new_zeros(capacity, C)
    expected[:kept] = x[keep].detach()
    same = dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rows, expected, **same)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, *torch.cumsum(keep.sum(1), 0).tolist()]
    torch.testing.assert_close(out, torch.where(keep[..., None], x, torch.full_like(x, case["fill"])), **same)
    drows, dout = (layout(torch.from_numpy(rng.standard_normal(t.shape)).to(device, case["dtype"]), rng) for t in (rows, out))
    dx, = torch.autograd.grad(rows, x, drows)
    expected = torch.zeros_like(x)
    expected[keep] = drows[:kept]
    torch.testing.assert_close(dx, expected, **same)
    dpacked, = torch.autograd.grad(out, packed, dout)
    expected = torch.zeros_like(packed)
    expected[:kept] = dout[keep]
    torch.testing.assert_close(dpacked, expected, **same)


@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("device", DEVICES)
def test_triton(device, count):
    explore(lambda case: check(case, "triton", device), cases(False), cases(True), count, describe)


@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("name, device", CUDA)
def test_cuda(name, device, count):
    explore(lambda case: check(case, name, device), cases(False), cases(True), count, describe)


@pytest.mark.parametrize("name, device", CUDA)
def test_cuda_chunks_and_bounds(name, device, monkeypatch):
    """Several tiles a block, more images than tokens; rows that are not there are zero, a mask at an odd address."""
    torch.manual_seed(0)
    for processors in (1, 200):
        monkeypatch.setattr(native, "processors", lambda index, processors=processors: processors)
        for B, N in ((257, 1), (3, 100), (1, 197), (1, 2500), (2, 600)):
            x, keep = torch.randn(B, N, 20, device=device), (torch.rand(B * N + 1, device=device) < 0.5)[1:].view(B, N)
            with backend(name):
                rows, cu_seqlens = ops.compact_tokens(x, keep, capacity=B * N + 33)
                out = ops.expand_rows(rows, cu_seqlens, keep, fill=0.5)
            lost = native_compact_tokens.expand_cuda(rows[:3], cu_seqlens - 1, keep, 0.5)
            assert torch.equal(rows[:int(keep.sum())], x[keep]) and not rows[int(keep.sum()):].any()
            assert torch.equal(out, torch.where(keep[..., None], x, 0.5)) and (lost[keep][4:] == 0).all() and (lost[~keep] == 0.5).all()
    if device == "cpu":  # on a GPU the device reports it later, and is lost
        with backend(name), pytest.raises(RuntimeError, match="more tokens kept than capacity 2"):
            ops.compact_tokens(torch.randn(1, 4, 3), torch.ones(1, 4, dtype=torch.bool), capacity=2)


@pytest.mark.parametrize("device", DEVICES)
def test_triton_chunks_and_dtypes(device):
    """Programs with several tiles, scans of several blocks, more images than tiles; bits of any dtype."""
    from vitprune.kernels import compact_tokens as kernel
    torch.manual_seed(0)
    few = {"rows": 4, "channels": 16, "scan": 32, "programs": 3, "num_warps": 4}
    for B, N in ((257, 1), (3, 100), (1, 197), (1, 1025)):
        for capacity in (B * N, B * N + 33):
            x, keep = torch.randn(B, N, 20, device=device), torch.rand(B, N, device=device) < 0.5
            rows, cu_seqlens = kernel.launch(x, keep, capacity, few)
            for a, b in zip((rows, cu_seqlens), ops.compact_tokens(x, keep, capacity=capacity)):
                assert torch.equal(a, b)
            assert torch.equal(kernel.launch_expand(rows, cu_seqlens, keep, 0.5, few), torch.where(keep[..., None], x, 0.5))
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.complex64, torch.float8_e4m3fn):
        x = torch.randint(0, 2, (2, 9, 4), device=device).to(dtype)
        rows, cu_seqlens = kernel.launch(x, torch.ones(2, 9, dtype=torch.bool, device=device), 18)
        assert torch.equal(rows.view(torch.uint8), x.view(18, 4).view(torch.uint8))
    assert "complex128" in kernel.refuses(torch.device(device), torch.complex128)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")
def test_triton_overflow():
    """More kept than capacity: reported, and nothing past the rows is written."""
    from vitprune.kernels import compact_tokens as kernel
    x, keep = torch.randn(2, 4, 3), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    with backend("triton"), pytest.raises(RuntimeError, match="more tokens kept than capacity 2"):
        ops.compact_tokens(x, keep, capacity=2)
    around = torch.full((4, 3), 7.0)
    kernel.compact_tokens_kernel[(1,)](x, keep.view(torch.uint8), around, torch.empty(3, dtype=torch.int32), 8, 4, 3, 2, 16, *x.stride(),
                                       SCAN=16, ROWS=4, CHANNELS=4)
    assert torch.equal(around[:2], x[keep][:2]) and (around[2:] == 7).all()


@pytest.mark.parametrize("device", DEVICES)
def test_triton_registered_and_deterministic(device):
    x, keep = torch.randn(2, 4, 3, device=device), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool, device=device)
    torch.library.opcheck(torch.ops.vitprune.compact_tokens.default, (x.clone().requires_grad_(), keep, 5, "triton"))
    rows, cu_seqlens = ops.compact_tokens(x, keep, capacity=5)
    torch.library.opcheck(torch.ops.vitprune.expand_rows.default, (rows.clone().requires_grad_(), cu_seqlens, keep, 0.0, "triton"))

    def both(x):
        rows, cu_seqlens = ops.compact_tokens(x, keep, capacity=5)
        return rows, ops.expand_rows(rows * 2, cu_seqlens, keep, fill=3.0)
    with backend("triton"):
        results = []
        for f in (both, both, torch.compile(both, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            out = f(leaf)
            results.append((*out, *torch.autograd.grad([o.square().sum() for o in out], leaf)))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", [a if a in (75, 80, 90, 120) else pytest.param(a, marks=pytest.mark.long) for a in ARCHS])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("C", [384, 768])
def test_triton_compiles(C, dtype, arch, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import compact_tokens as kernel
    monkeypatch.setattr(kernel.configs, "capability", lambda device: arch)
    x, keep = torch.empty(8, 197, C, dtype=dtype), torch.ones(8, 197, dtype=torch.bool)
    cu_seqlens = torch.empty(9, dtype=torch.int32)
    launches = record(monkeypatch, kernel, lambda: (kernel.launch(x, keep, 8 * 197),
                                                    kernel.launch_expand(x.view(-1, C), cu_seqlens, keep, 0.0)))
    assert len(launches) == 2
    for launch in launches:
        built = compile_launch(*launch, arch)
        assert built["spills"] == 0
        assert built["shared"] <= SHARED[arch]
