"""Every form of select_tokens against one independent truth: PyTorch, C++, Triton, CUDA."""
import pytest
import torch
from kernel_checks import ARCHS, CPP, INTERPRETED, SHARED, compile_launch, counts, record, seeds, tiled
from oracles import check_operator
from select_tokens_cases import case, check, describe

from vitprune import native
from vitprune.ops import backend, registry, select_tokens

CPU = torch.device("cpu")
ON_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
pytestmark = pytest.mark.usefixtures("poison")


def forced(name):
    def run(x, scores, k, prefix):
        with backend(name), torch.inference_mode():
            return select_tokens(x, scores, k, prefix=prefix)
    return run


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_cpu(name):
    if reason := registry.table("select_tokens", CPU)[name]:
        pytest.skip(reason)
    for seed in range(1000):
        check(forced(name), seed)
    for seed in range(50):
        check(forced(name), seed, large=True)


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_registered(name):
    if reason := registry.table("select_tokens", CPU)[name]:
        pytest.skip(reason)
    x, scores = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 5)
    check_operator(torch.ops.vitprune.select_tokens.default, [x, scores, 3, 1, name], (0,))
    with backend(name):
        compiled = torch.compile(lambda x, scores: select_tokens(x, scores, 3)[0], fullgraph=True, backend="aot_eager")
        for N in (5, 8, 50):  # the second size is traced as a symbol
            x, scores = torch.randn(2, N + 1, 3), torch.randn(2, N)
            assert torch.equal(compiled(x, scores), select_tokens(x, scores, 3)[0])


@pytest.mark.parametrize("device", [ON_GPU])
@pytest.mark.parametrize("name", ["reference", "cuda", "triton"])
def test_gpu(name, device):
    if reason := registry.table("select_tokens", torch.device(device, 0))[name]:
        pytest.fail(reason)
    for seed in range(250 if name == "triton" else 1000):  # every layout is compiled anew
        check(forced(name), seed, device=device)
    for seed in range(10 if name == "triton" else 50):
        check(forced(name), seed, large=True, device=device)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off: TRITON_INTERPRET=1")
@pytest.mark.parametrize("part", range(4))
def test_triton_interpreted(part):
    pytest.importorskip("triton")
    for seed in range(part * 250, (part + 1) * 250):
        check(forced("triton"), seed)
    check(forced("triton"), part, large=True)
    print(describe(case(seed) for seed in range(part * 250, (part + 1) * 250)))


@pytest.mark.interpreter
@pytest.mark.long
@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off: TRITON_INTERPRET=1")
@pytest.mark.parametrize("part", range(10))
def test_triton_interpreted_at_length(part):
    pytest.importorskip("triton")
    for seed in range(1000 + part * 1000, 2000 + part * 1000):
        check(forced("triton"), seed)
    print(describe(case(seed) for seed in range(1000 + part * 1000, 2000 + part * 1000)))


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=[pytest.mark.interpreter, pytest.mark.skipif(
    not INTERPRETED, reason="Triton's interpreter is off: TRITON_INTERPRET=1")]), ON_GPU])
def test_triton_edges(device):
    for B, N in ((257, 1), (1, 2), (2, 15), (1, 16), (2, 17), (1, 50), (1, 196), (1, 197), (1, 198), (1, 577), (1, 1025)):
        x, scores = torch.randn(B, N + 1, 3, device=device), torch.randint(0, 4, (B, N), device=device).float()
        few = {"pairs": 2 ** 20, "rows": 256} if device == "cpu" and N > 500 else {}  # steps to interpret
        for k in {0, 1, N}:
            with tiled("select_tokens", few):
                got = forced("triton")(x, scores, k, 1)
            for a, b in zip(got, forced("reference")(x, scores, k, 1)):
                assert torch.equal(a, b)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=[pytest.mark.interpreter, pytest.mark.skipif(
    not INTERPRETED, reason="Triton's interpreter is off: TRITON_INTERPRET=1")]), ON_GPU])
@pytest.mark.parametrize("count", counts(200, 10_000))
def test_triton_gradient(device, count):
    """The gradient of x is that of the kept rows in their places and zero elsewhere, bit for bit."""
    for seed in seeds(count):
        x, scores, k, prefix = case(seed, device=device, large=seed % 100 == 98)
        leaf = x.detach().requires_grad_()
        with backend("reference"):
            tokens, ids = select_tokens(leaf, scores, k, prefix=prefix)
        up = torch.arange(tokens.numel(), device=device).sin().to(tokens.dtype).view(tokens.shape)
        up = up if seed % 3 else up.transpose(0, 2).contiguous().transpose(0, 2)
        expected, = torch.autograd.grad(tokens, leaf, up)
        assert torch.equal(torch.ops.vitprune.select_tokens_backward(up, ids, prefix, x.shape[1]), expected), seed
    print(describe(case(seed, large=seed % 100 == 98) for seed in seeds(count)))
    x, scores = torch.randn(2, 6, 3, device=device), torch.randn(2, 5, device=device)
    torch.library.opcheck(torch.ops.vitprune.select_tokens.default, (x.clone().requires_grad_(), scores, 3, 1, "triton"))
    with backend("triton"):
        f = lambda x: select_tokens(x, scores, 3)[0].square().sum()  # noqa: E731
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        one, other = (x.clone().requires_grad_() for _ in range(2))
        assert torch.equal(*(torch.autograd.grad(g(leaf), leaf)[0] for g, leaf in ((f, one), (compiled, other))))


@CPP
def test_cuda_emulated(emulate, monkeypatch):
    emulate(80)
    for seed in range(1000):
        monkeypatch.setattr(native, "processors", lambda index, seed=seed: (1, 4, 132)[seed % 3])
        check(forced("cuda"), seed, large=seed % 100 == 99)


@CPP
@pytest.mark.parametrize("call", ["cuInit", "cuModuleLoadData", "cuLaunchKernel"])
def test_driver_errors_name_operator_cause_and_shapes(emulate, monkeypatch, call):
    emulate(80)
    monkeypatch.setenv("FAKE_CUDA_FAIL", call)
    with pytest.raises(RuntimeError, match=rf"^select_tokens: {call} failed: an illegal memory access was encountered "
                                           r"\(given \[1, 3, 4\] float32, \[1, 2\] float32\)$"):
        forced("cuda")(torch.ones(1, 3, 4), torch.ones(1, 2), 1, 1)


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("score", [torch.float16, torch.float64])
def test_triton_compiles(arch, score, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import select_tokens as kernel
    launch, = record(monkeypatch, kernel, lambda: kernel.launch(torch.empty(8, 197, 384), torch.empty(8, 196, dtype=score), 137, 1))
    built = compile_launch(*launch, arch)
    assert built["spills"] == 0
    assert built["shared"] <= SHARED[arch]


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", [a if a in (75, 80, 90, 120) else pytest.param(a, marks=pytest.mark.long) for a in ARCHS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_triton_gradient_compiles(arch, dtype, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import select_tokens as kernel
    ids = torch.empty(8, 137, dtype=torch.int64)
    launch, = record(monkeypatch, kernel, lambda: kernel.launch_backward(torch.empty(8, 138, 384, dtype=dtype), ids, 1, 197))
    built = compile_launch(*launch, arch)
    assert built["spills"] == 0
    assert built["shared"] <= SHARED[arch]
