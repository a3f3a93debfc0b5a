"""short_attention in Triton, CUDA C++ and C++."""
import contextlib
from unittest import mock

import pytest
import torch
from kernel_checks import ARCHS, CPP, CUDA, DEVICES, INTERPRETED, SHARED, compile_launch, counts, explore, record
from oracles import within_twice, within_twice_unless_lucky
from short_attention_cases import DTYPES, cases, describe, run, tensors_of

from vitprune import ops
from vitprune.native import short_attention as native

pytestmark = pytest.mark.usefixtures("poison")
LONG = pytest.mark.long
FORWARD_ONLY = [pytest.param("cpp", "cpu", marks=CPP), *CUDA]

FORWARD = [(16, 1, 64), (64, 1, 0), (16, 3, 0), (32, 2, 32), (64, 2, 64)]  # queries, spans, keys
# queries, keys, k_queries, k_keys; of products smaller than these numpy sums q k and k q in different orders, which no card does.
BACKWARD = [(16, 64, 128, 64), (64, 0, 64, 64), (16, 0, 64, 32), (64, 32, 64, 64), (64, 64, 64, 128)]


def triton(tensors, case):
    """`run` of the kernels with the tiles of the case, or the default ones (None). Interpreted as Hopper's and as others'; on a card as
    one of a single multiprocessor, whose programs ask for the rows of the next but one."""
    from vitprune.kernels import short_attention, short_attention_backward
    with contextlib.ExitStack() as stack:
        if INTERPRETED:
            stack.enter_context(mock.patch.object(short_attention.configs, "capability", return_value=(80, 90)[case.get("seed", 1) % 2]))
        else:
            stack.enter_context(mock.patch.object(short_attention, "processors", return_value=1))
        if case["tiles"] is not None:
            forward = dict(zip(("queries", "spans", "keys"), FORWARD[case["tiles"]])) | {"num_warps": 4, "num_stages": 1}
            backward = dict(zip(("queries", "keys", "k_queries", "k_keys"), BACKWARD[case["tiles"]])) | {
                "num_warps": 4, "num_stages": 1, "k_warps": 4, "k_stages": 1}
            stack.enter_context(mock.patch.object(short_attention, "default", return_value=forward))
            stack.enter_context(mock.patch.object(short_attention_backward, "default", return_value=backward))
        return run("triton", tensors, case)


def check(case, device, lucky):
    """Errors at most twice plain PyTorch's, which may round every value luckily; or two units in the last place of the largest value:
    half for the result, the rest for weights and their gradients, which both round on the way. Interpreted in float32 more: numpy sums q k
    and k q in orders of their own on some processors (see BACKWARD), whose scores of 30 differ by many units of a gradient of 4."""
    tensors, units = tensors_of(case, device), 32 if device == "cpu" and case["dtype"] == torch.float32 else 2
    got, plain, truth = triton(tensors, case), run("reference", tensors, case), run("reference", tensors, case, torch.Tensor.double)
    for a, b, c in zip(got, plain, truth):
        assert a.dtype == b.dtype and a.shape == b.shape
        lucky.append(within_twice_unless_lucky(a, b, c, units=units))


@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("device", DEVICES)
def test_triton(device, count):
    lucky = []
    explore(lambda case: check(case, device, lucky), cases(False), cases(True), count, describe)
    print("outputs and gradients beyond twice the error:", sum(lucky))
    assert sum(lucky) <= len(lucky) // 100


@pytest.mark.parametrize("cu_seqlens", [[0, 40], [-5, 3], [5, 2], [0, 6, 20], [-9, -2], [30, 40]])
@pytest.mark.parametrize("device", DEVICES)
def test_triton_touches_no_row_outside_of_its_buffers(device, cu_seqlens):
    """Whatever cu_seqlens holds: on a GPU nobody has looked at it."""
    from vitprune.kernels import short_attention, short_attention_backward
    T, C, pad, made, empty = 8, 3 * 16, 1 << 12, [], torch.empty

    def guarded(*shape, **options):
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        whole = empty(shape.numel() + 2 * pad, **options).fill_(7)
        made.append(whole)
        return whole[pad:pad + shape.numel()].view(shape)
    qkv = torch.randn(T, C, device=device)
    given = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    with (mock.patch.object(torch, "empty", guarded),
          mock.patch.object(torch.Tensor, "new_empty", lambda t, *shape, **given: guarded(
              *shape, **({"dtype": t.dtype, "device": t.device} | given)))):
        short_attention.launch(qkv, 1, given, 4, 0.25)
        short_attention_backward.launch(qkv[:, :16], qkv, 1, given, 4, 0.25)
    assert len(made) >= 3 and all((whole[:pad] == 7).all() and (whole[-pad:] == 7).all() for whole in made)


def forward(name, tensors, case):
    """The output alone, of a backend that has no gradient."""
    qkv, _, cu_seqlens, most = tensors
    with torch.no_grad(), ops.backend(name):
        return ops.short_attention(qkv, num_heads=case["H"], cu_seqlens=cu_seqlens, max_seqlen=most, scale=case["scale"])


@pytest.mark.parametrize("name, device, count", [
    pytest.param(*given.values, count, marks=[*given.marks, *([LONG] if count >= 1000 else [])])
    for given in FORWARD_ONLY for count in ((200, 10_000) if given.values[0] == "cpp" else (60, 1000))])
def test_forward(name, device, count):
    def check(case):
        if name == "cpp" and case["dtype"] == torch.float16:
            case["dtype"] = torch.float32
        tensors = tensors_of(case, device)
        truth = run("reference", tensors, case, torch.Tensor.double)[0]
        got, plain = forward(name, tensors, case), run("reference", tensors, case)[0]
        assert got.dtype == plain.dtype and got.shape == plain.shape
        within_twice(got, plain, truth)
    explore(check, cases(False), cases(True), count, describe)


@pytest.mark.parametrize("name, device", FORWARD_ONLY)
def test_forward_edges(name, device):
    torch.manual_seed(0)
    sizes = [(0, 5, 2, 16), (2, 0, 2, 16), (1, 1, 1, 16), (33, 1, 1, 16), (2, 15, 1, 16), (1, 16, 2, 48), (1, 17, 1, 32), (1, 63, 1, 80),
             (1, 64, 1, 64), (1, 65, 1, 128), (1, 257, 1, 16)]
    if name == "cpp":  # any width; and emulation takes minutes for lengths like these
        sizes += [(1, 1, 1, 1), (257, 1, 1, 8), (1, 47, 3, 20), (1, 48, 1, 64), (1, 49, 2, 33), (1, 577, 1, 64), (1, 1025, 1, 16)]
    kinds = [(torch.float32, 1e-5, 1e-6), (torch.bfloat16, 3e-2, 2e-2)]
    if name == "cuda":
        kinds = [(torch.float32, 1e-4, 1e-5), (torch.float16, 4e-3, 2e-3)]
    for B, N, H, D in sizes:
        for dtype, rtol, atol in kinds:
            qkv = torch.randn(B, N, 3 * H * D, device=device).to(dtype)
            case = {"H": H, "D": D, "scale": None}
            torch.testing.assert_close(forward(name, (qkv, None, None, None), case).double(),
                                       run("reference", (qkv, qkv[..., :H * D], None, None), case, torch.Tensor.double)[0],
                                       rtol=rtol, atol=atol)
    for slope in (0.02, 0.2, 2.0, -2.0):  # from key to key: sums are rescaled never, now and then, always
        rising, case = torch.randn(1, 150, 48, device=device), {"H": 1, "D": 16, "scale": 1.0}
        rising[..., 0], rising[..., 16] = 1, slope * torch.arange(150, device=device)
        truth = run("reference", (rising, rising[..., :16], None, None), case, torch.Tensor.double)[0]
        torch.testing.assert_close(forward(name, (rising, None, None, None), case).double(), truth, rtol=1e-3, atol=1e-3)
    bad, case = torch.randn(3, 20, 96, device=device), {"H": 2, "scale": None}
    bad[1, 7] = torch.nan
    out = forward(name, (bad, None, None, None), case)
    assert out[[0, 2]].isfinite().all() and out[1].isnan().all()
    ends = torch.tensor([0, 20, 20, 35, 40], dtype=torch.int32, device=device)
    rows = forward(name, (bad.flatten(0, 1), None, ends, 20), case)
    assert torch.equal(rows[:20], out[0]) and rows[20:35].isnan().all() and rows[35:40].isfinite().all() and not rows[40:].any()
    with ops.backend(name), pytest.raises(RuntimeError, match=r"forward only; inside of torch.no_grad\(\) it can"):
        ops.short_attention(bad.requires_grad_(), num_heads=2)


@pytest.mark.parametrize("name, device", CUDA)
def test_cuda_reads_no_rows_that_are_not_there(name, device):
    rows = torch.randn(60, 96, device=device)
    for ends in ([0, 20, 99, 60], [-5, 20, 40, 60], [0, 61, 62, 63], [40, 20, 0, 7]):
        native.cuda(rows, 2, torch.tensor(ends, dtype=torch.int32, device=device), 20, 0.25)
    with ops.backend("cuda"), torch.no_grad(), pytest.raises(RuntimeError, match="not a multiple of 16"):
        ops.short_attention(rows[None], num_heads=4)


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
        most = None if cu_seqlens is None else 3
        first = triton((x, up, cu_seqlens, most), case)
        for a, b in zip(first, triton((x, up, cu_seqlens, most), case)):
            assert torch.equal(a, b)


def kernels():
    pytest.importorskip("triton")
    from vitprune.kernels import short_attention, short_attention_backward
    return short_attention, short_attention_backward


def launches_of(monkeypatch, dtype, N, arch=80, B=128, H=6, D=64, packed=False):
    """What a forward and a backward launch, recorded on tensors without memory: a launcher that reads the device fails."""
    forward, backward = kernels()
    monkeypatch.setattr(forward.configs, "capability", lambda device: arch)
    monkeypatch.setattr(forward, "processors", lambda index: 132)
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
    """Lengths that round up to the same multiple of 16 launch the same code; in a loop those 64 apart too, packed all."""
    for lengths, codes in ((range(193, 209), 1), (range(65, 81), 1), (range(257, 273), 1), (range(257, 513), 1 if packed else 4)):
        launches = [launches_of(monkeypatch, torch.float16, N, packed=packed) for N in lengths]
        assert len({str([(kernel.fn.__name__, options) for kernel, _, options in of_one]) for of_one in launches}) == codes


def test_triton_candidates():
    for module in kernels():
        for dtype in DTYPES:
            for arch in (75, 80, 90):
                found = module.candidates(dtype, arch, B=8, H=6, N=197, D=64)
                assert found[0] == module.default(dtype, arch, B=8, H=6, N=197, D=64)
                assert 1 < len(found) <= 12 and len({str(c) for c in found}) == len(found)


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
        if arch == 90 and dtype != torch.float32 and launch[2]["KEYS" if "key_gradient" in launch[0].__name__ else "QUERIES"] >= 64:
            assert "wgmma" in built["ptx"]
