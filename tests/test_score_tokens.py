"""score_tokens: the predictor of the golden files, with less to multiply; and its kernel."""
import copy
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from kernel_checks import ARCHS, INTERPRETED, SHARED, compile_launch, counts, explore, kernels, layout, record, tiled
from oracles import check_operator, within_twice, within_twice_unless_lucky
from torch.utils.flop_counter import FlopCounterMode

from vitprune import ops
from vitprune.ops import registry
from vitprune.ops.linear import weight_and_bias
from vitprune.tokens import TokenPredictor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case(B, N, C, masked, seed=0):
    """(patches, predictor with weights that tell patches apart, mask), float64; the first image has lost every patch."""
    generator = torch.Generator().manual_seed(seed)
    predictor = TokenPredictor(C).double().eval()
    with torch.no_grad():
        for p in predictor.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(p.shape[-1], 4) ** 0.5)
    mask = torch.rand(B, N, generator=generator) < 0.6 if masked else None
    if masked:
        mask[:1] = False
    return torch.randn(B, N + 1, C, generator=generator, dtype=torch.float64)[:, 1:], predictor, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("B, N, C", [(1, 1, 8), (2, 16, 32), (3, 137, 64), (0, 5, 8), (2, 0, 8)])
def test_odds_are_those_of_the_predictor(B, N, C, masked):
    x, predictor, mask = case(B, N, C, masked)
    with torch.no_grad():
        truth = predictor(x, mask)[..., 0].exp().logit()
        for name in ("reference", "split"):
            with ops.backend(name):
                torch.testing.assert_close(ops.score_tokens(x, predictor, mask), truth, rtol=1e-9, atol=1e-9)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            small, same = x.to(dtype), copy.deepcopy(predictor).to(dtype)
            rounded = copy.deepcopy(same).double()(small.double(), mask)
            with ops.backend("reference"):
                plain = ops.score_tokens(small, same, mask)
            got = ops.score_tokens(small, same, mask)
            assert got.dtype == dtype
            within_twice(got, plain, rounded[..., 0] - rounded[..., 1])


TILES = ({}, {"rows": 16}, {"rows": 64, "columns": 16}, {"columns": 64, "depth": 16}, {"depth": 32, "score_rows": 64})
LARGE = ({"rows": 128, "columns": 128, "depth": 128, "score_rows": 128}, {"rows": 64, "columns": 64, "depth": 64, "score_rows": 256})


@st.composite
def cases(draw, real: bool):
    if real:
        (B, C), N = draw(st.sampled_from(((2, 192), (1, 384), (2, 384)))), draw(st.integers(64, 260))
    else:
        B, N, C = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.sampled_from((4, 12, 20, 64, 96)))
    return {"B": B, "N": N, "C": C, "dtype": draw(st.sampled_from(DTYPES)), "masked": draw(st.booleans()), "bias": draw(st.booleans()),
            # small tiles take longest to interpret
            "tile": draw(st.sampled_from(({}, *4 * LARGE) if real and INTERPRETED else TILES)), "seed": draw(st.integers(0, 2 ** 31))}


def layers(predictor):
    """The arguments between patches and mask of the registered operator."""
    norm, first, _ = predictor.in_conv
    return [*weight_and_bias(norm), norm.eps, *(t for i in (first, *predictor.out_conv[::2][:3]) for t in weight_and_bias(i))]


def check(c, name, device):
    x, predictor, mask = case(c["B"], c["N"], c["C"], c["masked"], c["seed"])
    x = 10 * x + 3 if c["seed"] % 2 else x
    same = predictor.to(c["dtype"]).to(device)
    if not c["bias"]:
        for layer in (*same.in_conv, *same.out_conv):
            layer.bias = None
    x, mask = layout(x.to(c["dtype"]).to(device), np.random.default_rng(c["seed"])), mask if mask is None else mask.to(device)
    mask = mask if mask is None or c["seed"] % 3 else mask.t().contiguous().t()
    found = {}
    with torch.no_grad():
        for which in (name, "reference"):
            with ops.backend(which), tiled("score_tokens", c["tile"]), mock.patch.object(registry, "run", wraps=registry.run) as ran:
                found[which] = ops.score_tokens(x, same, mask)
            assert ran.called == (which == name)
        truth = copy.deepcopy(same).double()(x.double(), mask)
    assert found[name].dtype == x.dtype and found[name].is_contiguous()
    truth = truth[..., 0] - truth[..., 1]
    if truth.numel() <= 4:  # of so few plain PyTorch may round every one luckily
        return within_twice_unless_lucky(found[name], found["reference"], truth, units=1)
    within_twice(found[name], found["reference"], truth)
    return False


def describe(c):
    return [str(c["dtype"]), f"C={c['C']}", *(key for key in ("masked", "bias") if c[key])] + ["real"] * (c["C"] >= 192)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("name, device", kernels("triton"))
def test_kernel(name, device, count):
    lucky = []
    explore(lambda c: lucky.append(check(c, name, device)), cases(False), cases(True), count, describe)
    print("cases beyond twice the error:", sum(lucky))
    assert sum(lucky) <= max(1, count // 100)


@pytest.mark.parametrize("name, device", kernels("triton"))
def test_kernel_serves_inference_alone(name, device):
    """Where gradients or autocast are on, hooks watch, or parts have been replaced, the plain form serves though the kernel is forced."""
    x, predictor, _ = case(2, 5, 16, False)
    x, predictor, kind = x.float().to(device), predictor.float().to(device), torch.device(device).type
    plain = ops.score_tokens(x, predictor)
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16):
        cast = ops.score_tokens(x, predictor)
    seen = []
    with ops.backend(name):
        assert ops.score_tokens(x, predictor).requires_grad
        with torch.no_grad():
            torch.testing.assert_close(ops.score_tokens(x, predictor), plain)
            with torch.autocast(kind, torch.bfloat16):
                torch.testing.assert_close(ops.score_tokens(x, predictor), cast, rtol=0, atol=0)
            with pytest.raises(ValueError, match="score_tokens: patches must be torch.float16, as the predictor's weights"):
                ops.score_tokens(x, copy.deepcopy(predictor).half())
            handle = predictor.out_conv[4].register_forward_hook(lambda *_: seen.append(1))
            torch.testing.assert_close(ops.score_tokens(x, predictor), plain)
            handle.remove()
            assert seen == [1]
            predictor.out_conv[1] = torch.nn.ReLU()
            expected = predictor(x)
            torch.testing.assert_close(ops.score_tokens(x, predictor), expected[..., 0] - expected[..., 1])
            with pytest.raises(RuntimeError, match="score_tokens: backend 'triton' cannot run here: no kernel for torch.float64"):
                ops.score_tokens(x.double(), TokenPredictor(16).double().to(device))


@pytest.mark.parametrize("name, device", kernels("triton"))
def test_kernel_registered_and_deterministic(name, device):
    x, predictor, mask = case(3, 40, 64, True)
    predictor = predictor.float().to(device)
    args = [x.float().to(device), *(t.detach() if isinstance(t, torch.Tensor) else t for t in layers(predictor)), mask.to(device), name]
    check_operator(torch.ops.vitprune.score_tokens.default, args)
    first = torch.ops.vitprune.score_tokens(*args)
    assert all(torch.equal(torch.ops.vitprune.score_tokens(*args), first) for _ in range(20))


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", [a if a in (75, 80, 90, 120) else pytest.param(a, marks=pytest.mark.long) for a in ARCHS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, C", [(1, 192), (1, 384), (128, 384), (32, 768)])
def test_kernel_compiles(B, C, dtype, arch, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import score_tokens as kernel
    monkeypatch.setattr(kernel.configs, "capability", lambda device: arch)
    with torch.device("meta"):
        x, args = torch.empty(B, 197, C, dtype=dtype)[:, 1:], layers(TokenPredictor(C).to(dtype))
        bare = [None if i in (1, 4, 6, 8, 10) else t for i, t in enumerate(args)]
        kept = torch.empty(B, 196, dtype=torch.bool)
        for launch in record(monkeypatch, kernel, lambda: [kernel.launch(x, *args, None), kernel.launch(x, *bare, kept)]):
            built = compile_launch(*launch, arch)
            assert built["spills"] == 0 and built["shared"] <= SHARED[arch]
            if dtype != torch.float32 and arch >= 80:
                assert "mma" in built["ptx"]


def test_gradients_are_those_of_the_predictor():
    x, predictor, _ = case(2, 5, 16, False)
    x.requires_grad_()
    got, expected = (torch.autograd.grad(f.square().sum(), (x, *predictor.parameters()))
                     for f in (ops.score_tokens(x, predictor), predictor(x)[..., 0].exp().logit()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_half_of_the_concatenation_is_not_multiplied():
    x, predictor, _ = case(2, 16, 32, False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.score_tokens(x, predictor)
    C, N = 32, 16
    assert counter.get_total_flops() // 2 == 2 * (N * (C * C + C * C // 4 + C * C // 8 + C // 2) + C * C // 4)


def test_the_last_layer_is_called_as_a_module():
    """A hook sees it, and one that was put in its place computes it; so in a predictor that something wraps."""
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    x, predictor, _ = case(2, 16, 32, False)
    seen = []
    predictor.out_conv[4].register_forward_hook(lambda *_: seen.append(1) or _[-1].flip(-1))
    with torch.no_grad(), ops.backend("split"):
        torch.testing.assert_close(ops.score_tokens(x, Wrapped(predictor)), predictor(x)[..., 0].exp().logit(), rtol=1e-9, atol=1e-9)
    assert len(seen) == 2


@pytest.mark.parametrize("part, i, other", [("out_conv", 1, torch.nn.ReLU()), ("in_conv", 2, torch.nn.GELU("tanh")),
                                            ("in_conv", 0, torch.nn.LayerNorm(32, elementwise_affine=False).double()),
                                            ("out_conv", slice(2, 5), (7, 2)), ("out_conv", 5, torch.nn.LogSoftmax(dim=1))])
def test_parts_that_are_replaced_are_called(part, i, other):
    x, predictor, mask = case(2, 16, 32, True)
    if isinstance(i, slice):  # layers of another width
        predictor.out_conv[2], predictor.out_conv[4] = torch.nn.Linear(16, 7).double(), torch.nn.Linear(*other).double()
    else:
        getattr(predictor, part)[i] = other
    with torch.no_grad():
        keep, drop = predictor(x, mask).unbind(-1)
        torch.testing.assert_close(ops.score_tokens(x, predictor, mask), keep - drop, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["in_conv.1", "out_conv", ""])
def test_parts_that_are_watched_or_wrapped_are_called(name):
    x, predictor, _ = case(2, 16, 32, False)
    seen, part = [], predictor.get_submodule(name)
    handle = part.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        ops.score_tokens(x, predictor)
        handle.remove()
        forward = part.forward
        part.forward = lambda *args: seen.append(2) or forward(*args)
        ops.score_tokens(x, predictor)
    assert seen == [1, 2]


def test_a_predictor_of_ones_own_is_called():
    """A subclass with another forward, one that shares nothing with ours, and what TorchScript made of ours."""
    class Colder(TokenPredictor):
        def forward(self, patches, policy=None):
            return (super().forward(patches, policy) / 2).log_softmax(-1)

    class Bright(torch.nn.Module):
        def forward(self, patches, policy=None):
            return torch.stack([patches.mean(-1), -patches.mean(-1)], -1).log_softmax(-1)

    x, _, mask = case(2, 16, 32, True)
    ours = TokenPredictor(32).double()
    for predictor in (Colder(32).double(), Bright(), torch.jit.script(ours), torch.jit.trace(ours, (x, mask))):
        with torch.no_grad():
            torch.testing.assert_close(ops.score_tokens(x, predictor, mask), predictor(x, mask)[..., 0].exp().logit())


def test_predictors_that_cast_by_themselves_are_called():
    """By a hook, also where the first layer was replaced by one without the attributes of a linear layer."""
    x, predictor, _ = case(2, 16, 32, False)
    predictor.register_forward_pre_hook(lambda m, args: (args[0].double(), *args[1:]))
    wrapped = copy.deepcopy(predictor)
    wrapped.in_conv[1] = torch.nn.Sequential(wrapped.in_conv[1])
    with torch.no_grad():
        expected = predictor(x.float())[..., 0].exp().logit()
        for one in (predictor, wrapped):
            torch.testing.assert_close(ops.score_tokens(x.float(), one), expected)


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton's")
def test_quantised_predictors_are_called():
    x, predictor, mask = case(2, 16, 32, True)
    x, predictor = x.float(), torch.ao.quantization.quantize_dynamic(predictor.float(), {torch.nn.Linear})
    with torch.no_grad():
        torch.testing.assert_close(ops.score_tokens(x, predictor, mask), predictor(x, mask)[..., 0].exp().logit(), rtol=1e-4, atol=1e-4)


def test_forward_mode_reaches_through_frozen_weights():
    x, predictor, _ = case(2, 9, 64, False)
    x, predictor = x.float(), predictor.float().requires_grad_(False)
    tangent = torch.randn_like(x)
    of = lambda x: ops.score_tokens(x, predictor)  # noqa: E731
    truth = torch.func.jvp(lambda x: predictor(x)[..., 0] - predictor(x)[..., 1], (x,), (tangent,))[1]
    assert truth.abs().max() > 0
    torch.testing.assert_close(torch.func.jvp(of, (x,), (tangent,))[1], truth)


def test_bad_input():
    x, predictor, _ = case(2, 5, 16, False)
    with pytest.raises(ValueError, match=r"score_tokens: patches must be \[B, N, 16\], got \(2, 5, 15\)"):
        ops.score_tokens(x[..., 1:], predictor)
    with pytest.raises(ValueError, match=r"score_tokens: mask must be \[B, N\] = \(2, 5\), got \(2, 4\)"):
        ops.score_tokens(x, predictor, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="score_tokens: mask must be bool, got torch.float64"):
        ops.score_tokens(x, predictor, torch.ones(2, 5, dtype=torch.float64))
