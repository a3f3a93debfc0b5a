import re
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from kernel_checks import ARCHS, CPP, CUDA, DEVICES, INTERPRETED, SHARED, compile_launch, explore, layout, record
from oracles import attention, check_operator, within_twice, within_twice_unless_lucky

from vitprune import ops
from vitprune.native import short_attention as native
from vitprune.ops.registry import choose

BACKENDS = ["reference", "library"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [1, 2, 9])
def test_formula(backend, N):
    torch.manual_seed(0)
    qkv = torch.randn(2, N, 3 * 2 * 4, dtype=torch.float64)
    with ops.backend(backend):
        out = ops.short_attention(qkv, num_heads=2)
    q, k, v = qkv.view(2, N, 3, 2, 4).unbind(2)
    for b in range(2):
        for h in range(2):
            expected = attention(*(t[b, :, h].numpy() for t in (q, k, v)), 0.5)
            np.testing.assert_allclose(out[b, :, 4 * h:4 * h + 4].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths, rows", [([3, 0, 4], 9), ([5], 5), ([0, 0], 2), ([1, 2], 3), ([], 2)])
def test_packed_is_one_sequence_at_a_time(backend, lengths, rows):
    torch.manual_seed(0)
    qkv = torch.randn(rows, 3 * 2 * 4, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with ops.backend(backend):
        out = ops.short_attention(qkv, num_heads=2, cu_seqlens=cu_seqlens, max_seqlen=max([*lengths, 1]) + 1)
    for a, b in zip(cu_seqlens, cu_seqlens[1:]):
        if b > a:
            assert torch.allclose(out[a:b], ops.short_attention(qkv[None, a:b], num_heads=2)[0], atol=1e-12)
    assert not out[cu_seqlens[-1]:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [47, 48, 97, 144, 145, 197, 320, 321])
def test_library_form_by_length(dtype, N):
    torch.manual_seed(0)
    qkv = torch.randn(2, N, 3 * 6 * 64).to(dtype)
    with ops.backend("library"):
        out = ops.short_attention(qkv, num_heads=6)
    with ops.backend("reference"):
        truth, same = ops.short_attention(qkv.double(), num_heads=6), ops.short_attention(qkv, num_heads=6)
    assert out.dtype == dtype and (out - truth).abs().max() <= 2 * (same - truth).abs().max() + 1e-5


def test_registered():
    qkv = torch.randn(2, 5, 24, dtype=torch.float64)
    op = torch.ops.vitprune.short_attention.default
    check_operator(op, [qkv, 2, None, 0, 0.5, "reference"], (0,))
    check_operator(op, [qkv[0], 2, torch.tensor([0, 2, 2, 4], dtype=torch.int32), 3, 0.5, "reference"], (0,))


def test_empty():
    assert ops.short_attention(torch.randn(0, 5, 24), num_heads=2).shape == (0, 5, 8)
    assert ops.short_attention(torch.randn(2, 5, 0), num_heads=2).shape == (2, 5, 0)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", [*BACKENDS, pytest.param("triton", marks=[pytest.mark.interpreter, pytest.mark.skipif(
    not INTERPRETED, reason="TRITON_INTERPRET=1")])])
def test_compiled_with_other_lengths(name, dynamic):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    with ops.backend(name):
        dense = torch.compile(lambda x: ops.short_attention(x, num_heads=2), fullgraph=True, backend="aot_eager", dynamic=dynamic)
        packed = torch.compile(lambda x, most: ops.short_attention(x, num_heads=2, cu_seqlens=cu_seqlens, max_seqlen=most), fullgraph=True,
                               backend="aot_eager", dynamic=dynamic)
        for N in (5, 7, 16, 1):
            x = torch.randn(2, N, 96, requires_grad=True)
            up = torch.randn(2, N, 32)
            got, plain = dense(x), ops.short_attention(x, num_heads=2)
            torch.testing.assert_close(got, plain)
            torch.testing.assert_close(*(torch.autograd.grad(out, x, up)[0] for out in (got, plain)))
            rows = torch.randn(4 + N, 96)
            torch.testing.assert_close(packed(rows, 2 + N), ops.short_attention(
                rows, num_heads=2, cu_seqlens=cu_seqlens, max_seqlen=2 + N))


FORWARD = [(16, 1, 64), (64, 1, 0), (16, 3, 0), (32, 2, 32), (64, 2, 64)]  # queries, spans, keys
# queries, keys, k_queries, k_keys; of products smaller than these numpy sums q k and k q in different orders, which no card does.
BACKWARD = [(16, 64, 128, 64), (64, 0, 64, 64), (16, 0, 64, 32), (64, 32, 64, 64), (64, 64, 64, 128)]


def random_case(seed, real):
    """Drawn by numpy: hypothesis repeats its choices, and a fifth of the cases would have most of the dtypes."""
    rng = np.random.default_rng(seed)
    H, D = (2, 64) if real else (int(rng.integers(1, 4)), int(rng.integers(1, 9)) * 16)
    B, least, most = (2, 64, 260) if real else (B := int(rng.integers(1, 5)), 0, int(rng.choice((64, 128, 256))) // (B * H))
    return {"H": H, "D": D, "lengths": rng.integers(least, most + 1, B).tolist(), "packed": rng.random() < 0.5, "real": real,
            "dtype": DTYPES[rng.integers(3)], "scale": (None, 0.05, 2 * D ** -0.5, -0.1)[rng.integers(4)],
            "spare": int(rng.integers(0, 20)), "tiles": int(rng.choice((1, 4) if real else (0, 1, 2, 3, 4))), "seed": seed}


def cases(real):
    return st.integers(0, 2 ** 32 - 1).map(lambda seed: random_case(seed, real))


def describe(case):
    N = max(case["lengths"])
    return [str(case["dtype"]), f"D={case['D']}", f"tiles={case['tiles']}", *(k for k in ("packed", "real") if case[k]),
            "N=" + next(f"..{most}" for most in (0, 1, 16, 64, 128, 256, 999) if N <= most)]


def tensors_of(case, device):
    """qkv, the upstream gradient, cu_seqlens or None, max_seqlen; NaN in rows that belong to no sequence."""
    rng, C = np.random.default_rng(case["seed"]), case["H"] * case["D"]
    shape = (sum(case["lengths"]) + case["spare"],) if case["packed"] else (len(case["lengths"]), case["lengths"][0])
    qkv, up = (torch.from_numpy(rng.standard_normal((*shape, width))).to(device, case["dtype"]) for width in (3 * C, C))
    qkv, up = layout(qkv, rng), layout(up, rng)
    if not case["packed"]:
        return qkv, up, None, None
    for t in (qkv, up):
        if case["spare"] and 0 not in t.stride():
            t[-case["spare"]:] = float("nan")
    cu_seqlens = torch.tensor([0, *np.cumsum(case["lengths"])], dtype=torch.int32, device=device)
    return qkv, up, cu_seqlens, max(case["lengths"]) + case["spare"] % 3


def run(name, tensors, case, convert=lambda t: t):
    """The output and the gradients of q, k and v, with the tiles of the case."""
    qkv, up, cu_seqlens, most = tensors
    qkv = convert(qkv).detach().requires_grad_()
    with ops.backend(name):
        out = ops.short_attention(qkv, num_heads=case["H"], cu_seqlens=cu_seqlens, max_seqlen=most, scale=case["scale"])
        return out, *torch.autograd.grad(out, qkv, convert(up))[0].chunk(3, -1)


def triton(tensors, case):
    """`run` of the kernels with the tiles of the case, or the default ones (None)."""
    if case["tiles"] is None:
        return run("triton", tensors, case)
    from vitprune.kernels import short_attention, short_attention_backward
    forward = dict(zip(("queries", "spans", "keys"), FORWARD[case["tiles"]])) | {"num_warps": 4, "num_stages": 1}
    backward = dict(zip(("queries", "keys", "k_queries", "k_keys"), BACKWARD[case["tiles"]])) | {
        "num_warps": 4, "num_stages": 1, "k_warps": 4, "k_stages": 1}
    with (mock.patch.object(short_attention, "default", return_value=forward),
          mock.patch.object(short_attention_backward, "default", return_value=backward)):
        return run("triton", tensors, case)


def check(case, device, lucky):
    """Errors at most twice plain PyTorch's, which may round every value luckily; or two units in the last place of the largest value:
    half for the result, the rest for weights and their gradients, which both round on the way."""
    tensors = tensors_of(case, device)
    got, plain, truth = triton(tensors, case), run("reference", tensors, case), run("reference", tensors, case, torch.Tensor.double)
    for a, b, c in zip(got, plain, truth):
        assert a.dtype == b.dtype and a.shape == b.shape
        lucky.append(within_twice_unless_lucky(a, b, c, units=2))


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("device", DEVICES)
def test_triton(device, count):
    lucky = []
    explore(lambda case: check(case, device, lucky), cases(False), cases(True), count, describe)
    print("outputs and gradients beyond twice the error:", sum(lucky))
    assert sum(lucky) <= len(lucky) // 100


def cpp(tensors, case):
    qkv, _, cu_seqlens, most = tensors
    return native.cpp(qkv, case["H"], cu_seqlens, most or 0, case["scale"] or case["D"] ** -0.5)


def check_cpp(case):
    case["dtype"] = torch.float32 if case["dtype"] == torch.float16 else case["dtype"]
    tensors = tensors_of(case, "cpu")
    truth = run("reference", tensors, case, torch.Tensor.double)[0]
    got, plain = cpp(tensors, case), run("reference", tensors, case)[0]
    assert got.dtype == plain.dtype and got.shape == plain.shape
    within_twice(got, plain, truth)


@CPP
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_cpp(count):
    explore(check_cpp, cases(False), cases(True), count, describe)


def native_cuda(tensors, case):
    qkv, _, cu_seqlens, most = tensors
    with torch.no_grad(), ops.backend("cuda"):
        return ops.short_attention(qkv, num_heads=case["H"], cu_seqlens=cu_seqlens, max_seqlen=most, scale=case["scale"])


@pytest.mark.parametrize("name, device", [pytest.param("cpp", "cpu", marks=CPP), *CUDA])
@pytest.mark.parametrize("shape, strides", [((4, 1, 96), (96, 384, 1)), ((1, 4, 96), (7, 288, 1))])
def test_strides_of_a_single_row_mean_nothing(name, device, shape, strides):
    qkv = torch.randn(1000, device=device).as_strided(shape, strides)
    with torch.no_grad(), ops.backend("reference"):
        expected = ops.short_attention(qkv, num_heads=2)
    with torch.no_grad(), ops.backend(name):
        torch.testing.assert_close(ops.short_attention(qkv, num_heads=2), expected)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name, device", CUDA)
def test_cuda(name, device, count):
    def check(case):
        tensors = tensors_of(case, device)
        truth = run("reference", tensors, case, torch.Tensor.double)[0]
        got, plain = native_cuda(tensors, case), run("reference", tensors, case)[0]
        assert got.dtype == plain.dtype and got.shape == plain.shape
        within_twice(got, plain, truth)
    explore(check, cases(False), cases(True), count, describe)


@pytest.mark.parametrize("name, device", CUDA)
def test_cuda_edges(name, device):
    torch.manual_seed(0)
    for B, N, H, D in [(0, 5, 2, 16), (2, 0, 2, 16), (1, 1, 1, 16), (33, 1, 1, 16), (2, 15, 1, 16), (1, 16, 2, 48), (1, 17, 1, 32),
                       (1, 63, 1, 80), (1, 64, 1, 64), (1, 65, 1, 128), (1, 257, 1, 16)]:
        for dtype in (torch.float32, torch.float16):
            qkv = torch.randn(B, N, 3 * H * D, device=device).to(dtype)
            case = {"H": H, "D": D, "scale": None}
            torch.testing.assert_close(native_cuda((qkv, None, None, None), case).double(),
                                       run("reference", (qkv, qkv[..., :H * D], None, None), case, torch.Tensor.double)[0],
                                       rtol=1e-4 if dtype == torch.float32 else 4e-3, atol=1e-5 if dtype == torch.float32 else 2e-3)
    bad = torch.randn(3, 20, 96, device=device)
    bad[1, 7] = torch.nan
    out = native_cuda((bad, None, None, None), {"H": 2, "scale": None})
    assert out[[0, 2]].isfinite().all() and out[1].isnan().all()
    for ends in ([0, 20, 99, 60], [-5, 20, 40, 60], [0, 61, 62, 63], [40, 20, 0, 7]):  # rows that are not there are not read or written
        native.cuda(bad.flatten(0, 1), 2, torch.tensor(ends, dtype=torch.int32, device=device), 20, 0.25)
    ends = torch.tensor([0, 20, 20, 35, 40], dtype=torch.int32, device=device)
    rows = native_cuda((bad.flatten(0, 1), None, ends, 20), {"H": 2, "scale": None})
    assert torch.equal(rows[:20], out[0]) and rows[20:35].isnan().all() and rows[35:40].isfinite().all() and not rows[40:].any()
    with ops.backend("cuda"), pytest.raises(RuntimeError, match="forward only"):
        ops.short_attention(bad.requires_grad_(), num_heads=2)
    with ops.backend("cuda"), torch.no_grad(), pytest.raises(RuntimeError, match="not a multiple of 16"):
        ops.short_attention(bad, num_heads=4)


@CPP
def test_cpp_edges():
    torch.manual_seed(0)
    for B, N, H, D in [(0, 5, 2, 16), (2, 0, 2, 16), (1, 1, 1, 1), (257, 1, 1, 8), (1, 47, 3, 20), (1, 48, 1, 64), (1, 49, 2, 33),
                       (1, 577, 1, 64), (1, 1025, 1, 16)]:
        qkv = torch.randn(B, N, 3 * H * D)
        with ops.backend("cpp"), torch.no_grad():
            got = ops.short_attention(qkv, num_heads=H)
        with ops.backend("reference"):
            torch.testing.assert_close(got.double(), ops.short_attention(qkv.double(), num_heads=H), rtol=1e-5, atol=1e-6)
    bad = torch.randn(3, 20, 96)
    bad[1, 7] = torch.nan
    out = native.cpp(bad, 2, None, 0, 0.25)
    assert out[[0, 2]].isfinite().all() and out[1].isnan().any()


@pytest.mark.parametrize("ends, most", [([0, 5, 3], 9), ([0, 11], 11), ([-1, 4], 9), ([0, 4, 8], 3), ([1, 4], 9)])
@pytest.mark.parametrize("name", [*BACKENDS, pytest.param("cpp", marks=CPP)])
def test_rows_that_are_not_there_are_refused(name, ends, most):
    qkv, ends = torch.randn(10, 96), torch.tensor(ends, dtype=torch.int32)
    message = re.escape(f"short_attention: cu_seqlens must ascend from 0 to at most 10 by at most max_seqlen={most}, got {ends.tolist()}")
    with ops.backend(name), torch.no_grad(), pytest.raises(ValueError, match=message):
        ops.short_attention(qkv, num_heads=2, cu_seqlens=ends, max_seqlen=most)
    if name == "cpp":  # as in a compiled graph, which meets the numbers only there
        with pytest.raises(ValueError, match=message):
            torch.ops.vitprune.short_attention(qkv, 2, ends, most, 0.25, "cpp")


@CPP
def test_cpp_serves_without_gradient_only():
    x = torch.randn(1, 4, 96)
    with ops.backend("cpp"):
        with pytest.raises(RuntimeError, match="forward only"):
            ops.short_attention(x, num_heads=2)
        with torch.no_grad():
            assert ops.short_attention(x, num_heads=2).shape == (1, 4, 32)
    assert choose("short_attention", x.device, x.dtype, fits=True, packed=False, large=False, small=True) == "library"
    with torch.no_grad():
        assert choose("short_attention", x.device, x.dtype, fits=True, packed=False, large=False, small=True) == "cpp"


def randoms(B, N, H, D, device, dtype=torch.float32):
    return torch.randn(B, N, 3 * H * D, device=device, dtype=dtype), torch.randn(B, N, H * D, device=device, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_triton_edges(device):
    """Sizes around tiles and beyond one pass; empty ones; equal scores; a bad image that stays alone, with its bad rows unread."""
    torch.manual_seed(0)
    for B, N, H, D, tiles in [
            (0, 5, 2, 16, None), (2, 0, 2, 16, None), (1, 1, 1, 16, None), (257, 1, 1, 16, 0), (1, 2, 3, 48, 1), (2, 15, 1, 16, 0),
            (1, 16, 2, 16, None), (1, 17, 1, 32, None), (1, 50, 1, 80, 2), (1, 196, 1, 16, 1), (1, 197, 1, 96, 3), (1, 198, 1, 64, 1),
            (1, 256, 1, 16, 1), (1, 257, 1, 16, 1), (1, 300, 1, 128, 4), (1, 577, 1, 64, 4), (1, 1025, 1, 16, 4)]:
        case = {"H": H, "scale": None, "tiles": tiles}
        tensors = (*randoms(B, N, H, D, device), None, None)
        for a, b in zip(triton(tensors, case), run("reference", tensors, case, torch.Tensor.double)):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    case = {"H": 2, "scale": None, "tiles": 1}
    same = torch.ones(1, 5, 96, device=device)
    assert (triton((same, same[..., :32], None, None), case)[0] == 1).all()
    qkv, up = randoms(3, 20, 2, 16, device)
    qkv[1, 7] = float("nan")
    qkv[1, 9] = float("inf")
    spoilt = triton((qkv, up, None, None), case)
    ends = torch.tensor([0, 20, 20, 35, 40], dtype=torch.int32, device=device)  # whole; empty; less than an image; the rest of the bad one
    for tiles in (0, 1, 4):
        rows = (qkv.flatten(0, 1), up.flatten(0, 1), ends, 20)
        for a, b in zip(triton(rows, case | {"tiles": tiles}), spoilt):
            torch.testing.assert_close(a[:20], b[0], rtol=1e-4, atol=1e-5)
            assert a[20:35].isnan().any() and a[35:40].isfinite().all() and not a[40:].any()
    for t in spoilt:
        assert t[[0, 2]].isfinite().all() and t[1].isnan().any()
    none = torch.zeros(1, dtype=torch.int32, device=device)
    assert not any(t.any() for t in triton((qkv[0], up[0], none, 5), case))


@pytest.mark.parametrize("device", DEVICES)
def test_triton_refusals(device):
    x = torch.randn(1, 4, 96, device=device)
    with ops.backend("triton"):
        with pytest.raises(RuntimeError, match="no kernel for torch.float64"):
            ops.short_attention(x.double(), num_heads=2)
        for H in (4, 32):
            with pytest.raises(RuntimeError, match="width is not a multiple of 16 in 16..128"):
                ops.short_attention(x, num_heads=H)
        with pytest.raises(RuntimeError, match="width is not a multiple of 16"):
            ops.short_attention(torch.randn(1, 4, 3 * 144, device=device), num_heads=1)


@pytest.mark.parametrize("device", DEVICES)
def test_triton_registered_and_deterministic(device):
    torch.manual_seed(0)
    op = torch.ops.vitprune.short_attention.default
    ends = torch.tensor([0, 2, 2, 4], dtype=torch.int32, device=device)
    for x, cu_seqlens in ((torch.randn(2, 5, 96, device=device), None), (torch.randn(6, 96, device=device), ends)):
        torch.library.opcheck(op, (x.clone().requires_grad_(), 2, cu_seqlens, 3, 0.25, "triton"))
        case, up = {"H": 2, "scale": None, "tiles": None}, torch.randn(*x.shape[:-1], 32, device=device)
        first = triton((x, up, cu_seqlens, 3), case)
        for a, b in zip(first, triton((x, up, cu_seqlens, 3), case)):
            assert torch.equal(a, b)


def kernels():
    pytest.importorskip("triton")
    from vitprune.kernels import short_attention, short_attention_backward
    return short_attention, short_attention_backward


def launches_of(monkeypatch, dtype, N, arch=80, B=128, H=6, D=64, packed=False):
    """What a forward and a backward launch, recorded on tensors without memory: a launcher that reads the device fails."""
    forward, backward = kernels()
    monkeypatch.setattr(forward.configs, "capability", lambda device: arch)
    with torch.device("meta"):
        qkv = torch.empty(*((B * N,) if packed else (B, N)), 3 * H * D, dtype=dtype)
        ends = torch.empty(B + 1, dtype=torch.int32) if packed else None
    return [launch for module, call in (
        (forward, lambda: forward.launch(qkv, H, ends, N, 0.125)),
        (backward, lambda: backward.launch(qkv[..., :H * D].contiguous(), qkv, H, ends, N, 0.125)))
        for launch in record(monkeypatch, module, call)]


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("packed", [False, True])
def test_triton_compiles_once_a_bucket(packed, monkeypatch):
    """Lengths that round up to the same multiple of 16 launch the same code."""
    for lengths in (range(193, 209), range(65, 81), range(257, 513)):
        launches = [launches_of(monkeypatch, torch.float16, N, packed=packed) for N in lengths]
        assert len({str([(kernel.fn.__name__, options) for kernel, _, options in of_one]) for of_one in launches}) == 1


def test_triton_candidates():
    for module in kernels():
        for dtype in DTYPES:
            for arch in (75, 80, 90):
                found = module.candidates(dtype, arch, B=8, H=6, N=197, D=64)
                assert found[0] == module.default(dtype, arch, B=8, H=6, N=197, D=64)
                assert 1 < len(found) <= 12 and len({str(c) for c in found}) == len(found)


LONG = pytest.mark.long


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", [a if a in (75, 80, 90, 120) else pytest.param(a, marks=LONG) for a in ARCHS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, D, B, packed", [(197, 64, 128, False), (138, 64, 128, True), *(pytest.param(*c, marks=LONG) for c in [
    (197, 64, 8, True), (138, 64, 8, False), (97, 64, 128, True), (68, 64, 128, False), (256, 64, 8, False), (577, 64, 8, True),
    (197, 16, 128, True), (197, 32, 128, False), (197, 48, 8, True), (128, 80, 128, True), (197, 96, 8, False), (197, 128, 128, True),
    (68, 128, 128, True), (300, 128, 8, False)])])
def test_triton_compiles(N, D, B, packed, dtype, arch, monkeypatch):
    launches = launches_of(monkeypatch, dtype, N, arch, B, 6, D, packed)
    assert len(launches) == 3
    for launch in launches:
        built = compile_launch(*launch, arch)
        assert built["spills"] == 0
        assert built["shared"] <= SHARED[arch]
        if arch >= 80 and dtype != torch.float32:
            assert any(name in built["ptx"] for name in ("mma.sync", "wgmma", "tcgen05.mma"))
        if arch == 90 and dtype != torch.float32 and launch[0].__name__ == "forward_kernel":
            assert "wgmma" in built["ptx"]
