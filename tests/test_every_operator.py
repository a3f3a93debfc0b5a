"""What holds for every operator in every backend: one graph for all sizes, autocast, far offsets, same bits, streams, CUDA graphs."""
import contextlib
import functools

import pytest
import sanitize
import torch
from kernel_checks import CPP, DEVICES, INTERPRETED
from oracles import within_twice_unless_lucky
from torch._dynamo.testing import CompileCounterWithBackend

from vitprune import cases, native
from vitprune.cases import Size
from vitprune.ops import backend, registry

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU")
KERNELS = ("triton", "cuda")
SMALL = Size(2, 1, 0.5, tokens=9)
FORWARD_ONLY = ("layer_norm", "score_tokens", "select_norm")  # in Triton


def prepared(case, size, device, dtype=torch.float32):
    """(function, arguments, gradients of its outputs)"""
    function, args = cases.inputs(case, size, torch.device(device), dtype)
    with backend("reference"):
        return function, args, cases.upstream(cases.run(function, args, None))


def forced(case, name, device, **facts):
    """The backend of that name; skips where the operator has none or it cannot run there."""
    op = case.split()[0]
    if name not in registry.TABLES[op]:
        pytest.skip(f"{op} has no {name}")
    if reason := registry.table(op, torch.device(device), **facts)[name]:
        pytest.skip(reason)
    return backend(name)


def results(function, args, ups):
    """Outputs and every gradient; forward alone where the operator has no other in that backend."""
    return cases.run(function, args, ups)


@pytest.mark.parametrize("name, device", [("reference", "cpu"), *(pytest.param("triton", *d.values, marks=d.marks) for d in DEVICES)])
@pytest.mark.parametrize("case", cases.CASES)
def test_one_recompilation_serves_every_size(case, name, device):
    """Whole graphs, forward and backward: the first sizes seen, then one for all others."""
    function, first, _ = prepared(case, SMALL, device)
    weights = {"sliced_linear out": (1, 2, 3), "sliced_linear in": (1, 2, 3), "sliced_mlp": (1, 2, 3, 4, 5),
               "sliced_mlp dense": (1, 2, 3, 4)}.get(case, ())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    sizes = [SMALL, *(Size(B, 1, 0.5, tokens=9 if "packed" in case else N) for B, N in ((3, 12), (5, 17), (4, 10)))]
    learns = name != "triton" or case not in FORWARD_ONLY
    with forced(case, name, device, grad=learns):
        for size in sizes:
            args = prepared(case, size, device)[1]
            args = [first[i] if i in weights else a for i, a in enumerate(args)]
            ups = cases.upstream(cases.run(function, args, None)) if learns else None
            for got, expected in zip(results(compiled, args, ups), results(function, args, ups), strict=True):
                torch.testing.assert_close(got, expected)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("name, device", [pytest.param("triton", *d.values, marks=d.marks) for d in DEVICES])
@pytest.mark.parametrize("case", [c for c in cases.CASES if c != "score_tokens"])
def test_autocast(case, name, device):
    """Under autocast outputs have the plain form's dtypes, gradients those of their tensors, and errors at most twice its."""
    function, args, ups = prepared(case, Size(2, 1, 0.5, tokens=20), device)
    truth = results(function, [a.double() if a.is_floating_point() else a for a in args], [u.double() for u in ups])
    found = {}
    for which in (name, "reference"):
        with forced(case, which, device, autocast=True), torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                kinds = [o.dtype for o in cases._list(function(*args))]
            cast = [u.to(k) for u, k in zip(ups, [k for k in kinds if k.is_floating_point])]
            found[which] = kinds, results(function, args, cast)
    assert found[name][0] == found["reference"][0]
    for got, plain, c in zip(found[name][1], found["reference"][1], truth, strict=True):
        assert got.dtype == plain.dtype
        if got.is_floating_point():
            within_twice_unless_lucky(got if got.dtype == torch.bfloat16 else got.bfloat16(), plain, c)


@CPP
def test_who_watches_sees_the_operator():
    """Eager calls go past PyTorch's dispatcher, but not past a profiler or a mode."""
    function, args, _ = prepared("select_tokens", SMALL, "cpu")
    with forced("select_tokens", "cpp", "cpu"):
        with torch.profiler.profile() as profile:
            function(*args)
        assert "vitprune::select_tokens" in {event.key for event in profile.key_averages()}
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            function(*args)
        assert torch.ops.vitprune.select_tokens in counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("watched", [False, True])
@CPP
def test_a_second_derivative_is_refused_by_name(watched):
    function, args, ups = prepared("policy_attention", SMALL, "cpu")
    x, policy = (a.requires_grad_() for a in args)
    with forced("policy_attention", "cpp", "cpu"), torch.profiler.profile() if watched else contextlib.nullcontext():
        first, = torch.autograd.grad(function(x, policy), x, ups, create_graph=True)
        with pytest.raises(RuntimeError, match="^policy_attention: kernels have no second derivative"):
            first.sum().backward()


@pytest.mark.parametrize("name, device", [pytest.param("triton", *d.values, marks=d.marks) for d in DEVICES])
@pytest.mark.parametrize("case", cases.CASES)
def test_a_second_derivative_is_right_or_refused_by_name(case, name, device):
    function, args, ups = prepared(case, SMALL, device)

    def second():
        leaves = [a.detach().requires_grad_(a.is_floating_point()) for a in args]
        out = function(*leaves)
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        above = [up.detach().requires_grad_() for up in ups]
        first = torch.autograd.grad(out, wanted, above, create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), [*wanted, *above], allow_unused=True)
    with backend("reference"):
        expected = second()
    with forced(case, name, device, grad=True):
        try:
            got = second()
        except RuntimeError as error:
            if not str(error).startswith(f"{case.split()[0]}: kernels have no second derivative"):
                raise
            return
    assert [g is None for g in got] == [e is None for e in expected]
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4)


IN_CPP = ("select_tokens", "policy_attention", "short_attention", "short_attention packed")


@pytest.fixture
def defaults():
    yield torch.set_default_dtype, torch.set_default_device
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("which, value", [(0, torch.float64), (0, torch.bfloat16), (1, "meta")])
@pytest.mark.parametrize("case", IN_CPP)
@CPP
def test_defaults_of_torch_change_nothing(case, which, value, defaults):
    function, args, ups = prepared(case, SMALL, "cpu")
    with forced(case, "cpp", "cpu"), torch.set_grad_enabled("short" not in case):
        expected = results(function, args, ups if torch.is_grad_enabled() else None)
        defaults[which](value)
        for got, same in zip(results(function, args, ups if torch.is_grad_enabled() else None), expected, strict=True):
            assert got.dtype == same.dtype
            assert torch.equal(got, same)


@pytest.mark.parametrize("case", [c for c in IN_CPP if "attention" in c])
@CPP
def test_a_dtype_that_autocast_brings_is_refused_as_any(case):
    function, args, _ = prepared(case, SMALL, "cpu")
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        torch.testing.assert_close(function(*args), function(*(a.half() if a.is_floating_point() else a for a in args)), rtol=0, atol=2e-3)
        with forced(case, "cpp", "cpu"), pytest.raises(RuntimeError, match="'cpp' cannot run here: no kernel for torch.float16"):
            function(*args)


@pytest.mark.parametrize("case", IN_CPP)
@CPP
def test_forward_mode_is_right_or_refused(case):
    """Kernels know no tangents: the reference serves, and a kernel that is forced says so."""
    function, args, _ = prepared(case, SMALL, "cpu")
    x, rest, tangent = args[0], args[1:], torch.randn_like(args[0])
    of = lambda x: cases._list(function(x, *rest))[0]  # noqa: E731
    with backend("reference"):
        expected = torch.func.jvp(of, (x,), (tangent,))[1]
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.func.jvp(of, (x,), (tangent,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(of(dual)).tangent, expected)
        with backend("cpp"), pytest.raises(RuntimeError, match=f"^{case.split()[0]}: backend 'cpp' has no forward-mode derivative"):
            of(dual)


@pytest.mark.parametrize("case", IN_CPP)
@CPP
def test_torch_func_is_right_or_refused(case):
    function, args, _ = prepared(case, SMALL, "cpu")
    x, rest = args[0], args[1:]
    of = lambda x: cases._list(function(x, *rest))[0].square().sum()  # noqa: E731
    with backend("reference"):
        expected, = torch.autograd.grad(of(x.requires_grad_()), x)
    torch.testing.assert_close(torch.func.grad(of)(x.detach()), expected)
    with backend("cpp"), pytest.raises(RuntimeError, match=f"^{case.split()[0]}: backend 'cpp' has no form that torch.func transforms"):
        torch.func.grad(of)(x.detach())


@CPP
def test_a_sign_that_is_only_noted_counts():
    function, (x, scores), _ = prepared("select_tokens", SMALL, "cpu")
    with forced("select_tokens", "cpp", "cpu"):
        for got, expected in zip(function(torch._neg_view(x), torch._neg_view(scores)), function(-x, -scores)):
            assert torch.equal(got, expected)


NAMES = {"select_tokens": "x scores", "select_norm": "x scores weight bias", "compact_tokens": "x keep",
         "expand_rows": "rows cu_seqlens keep",
         "add_norm": "x residual weight bias", "short_attention packed": "qkv cu_seqlens", "sliced_linear out": "x w b live",
         "sliced_linear in": "x w b live", "sliced_mlp": "x w1 b1 w2 b2 live residual", "sliced_mlp dense": "x w1 b1 w2 b2 residual"}


@pytest.mark.parametrize("case, name", [(case, name) for case, names in NAMES.items() for name in names.split()[1:]])
def test_tensors_on_two_devices_are_refused(case, name):
    function, args, _ = prepared(case, SMALL, "cpu")
    names = NAMES[case].split()
    assert len(args) == len(names)
    i = names.index(name)
    with pytest.raises(ValueError, match=f"^{case.split()[0]}: {name} must be on {names[0]}'s device cpu, got meta$"):
        function(*args[:i], args[i].to("meta"), *args[i + 1:])


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
        expected = results(function, args, ups)
        for i, a in enumerate(args):
            for dim in range(a.dim() if a.dim() > 1 and a.is_floating_point() else 0):
                if a.shape[dim] > 1:
                    moved = [far(a, dim) if i == j else b for j, b in enumerate(args)]
                    for got, same in zip(results(function, moved, ups), expected, strict=True):
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
            results(function, args, ups)
        except RuntimeError as error:
            if "forward only" not in str(error):
                raise
            ups = None
        first = results(function, args, ups)
        for _ in range(1000):
            assert all(torch.equal(a, b) for a, b in zip(results(function, args, ups), first, strict=True))
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            assert all(torch.equal(a, b) for a, b in zip(results(function, args, ups), first, strict=True))
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            with torch.cuda.graph(graph):
                captured = results(function, args, ups)
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
            found.append(results(function, args, ups if not case.startswith("short_attention") else None))
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
