"""What holds for every operator in every backend: far offsets, the same bits in graphs and streams, what the sanitizer watches."""
import functools

import pytest
import sanitize
import torch
from kernel_checks import CPP, DEVICES, FORWARD_ONLY, INTERPRETED, SMALL, forced, prepared

from vitprune import cases, native
from vitprune.cases import Size
from vitprune.ops import backend, registry

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU")
KERNELS = ("triton", "cuda")


@pytest.fixture
def far(tmp_path):
    """far(t): the same values, the rows of its last dimension but one further apart than 2^31 elements allow, in a file of holes."""
    def place(t, dim):
        step = 2 ** 31 // min(t.shape[dim] - 1, 63) + 1  # within one head of channels
        order = [d for d in range(t.dim()) if d != dim]
        stride, inner = [0] * t.dim(), 1
        for d in reversed(order):
            stride[d], inner = inner, inner * t.shape[d]
        stride[dim] = step
        assert inner <= step
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        size = step * t.shape[dim]
        with path.open("wb") as file:
            file.truncate(size * t.element_size())
        whole = torch.from_file(str(path), shared=True, size=size, dtype=t.dtype)
        return whole.as_strided(t.shape, stride).copy_(t)
    return place


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", cases.CASES)
def test_offsets_past_two_to_the_31(case, far):
    """Every tensor of two dimensions or more, along each of them: offsets are 64-bit."""
    function, args, ups = prepared(case, SMALL, "cpu", torch.float16)
    ups = None if case in FORWARD_ONLY else ups
    with backend("triton"):
        expected = cases.run(function, args, ups)
        for i, a in enumerate(args):
            for dim in range(a.dim() if a.dim() > 1 and a.is_floating_point() else 0):
                if a.shape[dim] > 1:
                    moved = [far(a, dim) if i == j else b for j, b in enumerate(args)]
                    for got, same in zip(cases.run(function, moved, ups), expected, strict=True):
                        torch.testing.assert_close(got, same, rtol=1e-3, atol=1e-3)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")
def test_offsets_past_two_to_the_31_in_a_loop(far):
    """The first step of short_attention's loop begins that far on."""
    from vitprune.kernels import short_attention
    qkv = torch.randn(1, 130, 48).half()
    config = {"queries": 64, "spans": 3, "keys": 64, "num_warps": 4, "num_stages": 1}
    got, expected = (short_attention.launch(t, 1, None, None, 0.25, config) for t in (far(qkv, 1), qkv))
    torch.testing.assert_close(got, expected)


@ON_GPU
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("size", [SMALL, Size(4, 6, 0.7)], ids=["small", "real"])
def test_same_bits_a_thousand_times_in_graphs_and_streams(case, name, size):
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # where there are several, not the current one
    function, args, ups = prepared(case, size, device, torch.float16)
    with forced(case, name, device):
        try:
            cases.run(function, args, ups)
        except RuntimeError as error:
            if "forward only" not in str(error):
                raise
            ups = None
        first = cases.run(function, args, ups)
        for _ in range(1000):
            assert all(torch.equal(a, b) for a, b in zip(cases.run(function, args, ups), first, strict=True))
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            assert all(torch.equal(a, b) for a, b in zip(cases.run(function, args, ups), first, strict=True))
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            with torch.cuda.graph(graph):
                captured = cases.run(function, args, ups)
            given = {up.data_ptr() for up in ups or ()}  # the gradient of a residual is the gradient it was given
            for _ in range(3):
                with torch.inference_mode():
                    for t in captured:
                        if t.data_ptr() not in given:
                            t.zero_()
                graph.replay()
                assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


@ON_GPU
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", [c for c in cases.CASES if c != "score_tokens"])
def test_nvrtc_and_nvcc_give_the_same_bits(case, kind, monkeypatch):
    device = torch.device("cuda", 0)
    if native.forced() or not native.cubins():
        pytest.skip("no cubins, or code of another architecture is forced")
    function, args, ups = prepared(case, Size(4, 6, 0.7), device, kind)
    found = []
    with forced(case, "cuda", device):
        for path in (native.cubin_path, lambda op, capability: None):
            monkeypatch.setattr(native, "cubin_path", path)
            native.kernel.cache_clear()
            found.append(cases.run(function, args, ups if not case.startswith("short_attention") else None))
    native.kernel.cache_clear()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@ON_GPU
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", [c for c in cases.CASES if not c.startswith(("score", "sliced"))])
def test_more_than_two_to_the_31_elements(case, name):
    """The last images of a batch that large are as those of a small one; attention and selection treat each image alone."""
    device = torch.device("cuda")
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    rows = 2 ** 31 // (64 * 12 * (3 if "attention" in case else 1)) // 197 + 2
    function, args = cases.inputs(case, Size(rows, 12, 1.0), device, torch.float16)
    with forced(case, name, device):
        whole = cases.run(function, args, None)[0]
        tail = cases.run(*tail_of(case, args, rows), None)[0]
    # Launches of attention differ by the batch, and so does the order of its sums: by a float16's last place below a half.
    off = {"rtol": 1e-3, "atol": 2.0 ** -12} if "attention" in case else {}
    torch.testing.assert_close(whole.flatten(0, -2)[-tail.flatten(0, -2).shape[0]:], tail.flatten(0, -2), **off)


def tail_of(case, args, rows):
    """The same call on the last two images."""
    function = functools.partial(cases.inputs, case, Size(2, 12, 1.0), args[0].device, torch.float16)()[0]
    if case == "short_attention packed":
        return function, [args[0][-2 * 197:], args[1][:3]]
    if case == "expand_rows":
        return function, [args[0][-2 * 197:], args[1][:3], args[2][-2:]]
    return function, [a[-2:] if a.shape[:1] == (rows,) else a for a in args]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=CPP), DEVICES[1]])
def test_what_the_sanitizer_watches(device, capsys):
    """Every kernel that can run there, beside float64."""
    assert not sanitize.failures(torch.device(device))
    able = {(op, name) for op, table in registry.TABLES.items() for name, reason in registry.table(op, torch.device(device)).items()
            if reason is None and not table[name].composite}
    called = {(line.split()[0], line.split()[-1]) for line in capsys.readouterr().err.splitlines() if "Size(" in line}
    assert called == able
