"""What holds for every operator in every backend: one graph for all sizes, autocast, derivatives, devices."""
import contextlib

import pytest
import torch
from kernel_checks import CPP, DEVICES, FORWARD_ONLY, SMALL, forced, prepared
from oracles import within_twice_unless_lucky
from torch._dynamo.testing import CompileCounterWithBackend

from vitprune import cases
from vitprune.cases import Size
from vitprune.ops import backend


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
            for got, expected in zip(cases.run(compiled, args, ups), cases.run(function, args, ups), strict=True):
                torch.testing.assert_close(got, expected)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("name, device", [pytest.param("triton", *d.values, marks=d.marks) for d in DEVICES])
@pytest.mark.parametrize("case", [c for c in cases.CASES if c != "score_tokens"])
def test_autocast(case, name, device):
    """Under autocast outputs have the plain form's dtypes, gradients those of their tensors, and errors at most twice its."""
    function, args, ups = prepared(case, Size(2, 1, 0.5, tokens=20), device)
    truth = cases.run(function, [a.double() if a.is_floating_point() else a for a in args], [u.double() for u in ups])
    found = {}
    for which in (name, "reference"):
        with forced(case, which, device, autocast=True), torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                kinds = [o.dtype for o in cases._list(function(*args))]
            cast = [u.to(k) for u, k in zip(ups, [k for k in kinds if k.is_floating_point])]
            found[which] = kinds, cases.run(function, args, cast)
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
        expected = cases.run(function, args, ups if torch.is_grad_enabled() else None)
        defaults[which](value)
        for got, same in zip(cases.run(function, args, ups if torch.is_grad_enabled() else None), expected, strict=True):
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
