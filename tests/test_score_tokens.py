"""score_tokens: the predictor of the golden files, with less to multiply."""
import copy

import pytest
import torch
from oracles import within_twice
from torch.utils.flop_counter import FlopCounterMode

from vitprune import ops
from vitprune.tokens import TokenPredictor


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


def test_bad_input():
    x, predictor, _ = case(2, 5, 16, False)
    with pytest.raises(ValueError, match=r"score_tokens: patches must be \[B, N, 16\], got \(2, 5, 15\)"):
        ops.score_tokens(x[..., 1:], predictor)
    with pytest.raises(ValueError, match=r"score_tokens: mask must be \[B, N\] = \(2, 5\), got \(2, 4\)"):
        ops.score_tokens(x, predictor, torch.ones(2, 4, dtype=torch.bool))
