"""The edges of every operator, once, in every kernel: no, one and many images and tokens, nothing and everything kept, against float64.

Those of attention's and of the selection's numbers (large scores, what is not finite, ties) are beside their own tests."""
import copy

import pytest
import torch
from kernel_checks import COMPILED, CUDA, DEVICES, kernels
from torch.nn import functional as F

from vitprune import ops
from vitprune.cases import run, upstream
from vitprune.ops import backend, registry
from vitprune.tokens import TokenPredictor

pytestmark = pytest.mark.usefixtures("poison")
SIZES = ((0, 5), (2, 0), (257, 1), (1, 2), (2, 15), (1, 16), (1, 17), (1, 50), (1, 196), (1, 197), (1, 198), (1, 577), (1, 1025))
TRITON = [*kernels("triton"), *COMPILED]


def randoms(device, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def check(name, function, args, learns=True, tolerance=1e-5):
    """Outputs and gradients in float32 are those of the reference in float64."""
    wide = [a.double() if a.is_floating_point() else a for a in args]
    with backend("reference"):
        ups = upstream(run(function, args, None)) if learns else None
        expected = run(function, wide, ups and [u.double() for u in ups])
    with backend(name):
        got = run(function, args, ups)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * (1 + float(b.abs().max() if b.numel() else 0)))


@pytest.mark.parametrize("B, N", SIZES)
@pytest.mark.parametrize("name, device", TRITON + CUDA)
def test_norms(name, device, B, N):
    x, residual, weight, bias = randoms(device, (B, N, 8), (B, N, 8), (8,), (8,))
    check(name, lambda *args: ops.add_norm(*args, 1e-6), [x, residual, weight, bias])
    if name == "triton":
        check(name, lambda *args: ops.layer_norm(*args, 1e-6), [x, weight, bias], learns=False)


@pytest.mark.parametrize("C", [24, 384, 768])
@pytest.mark.parametrize("name, device", TRITON + CUDA)
def test_norms_of_nearly_equal_values(name, device, C):
    """A thousandth of them would be a thousand times what rounding makes of their mean."""
    rows, noise, weight, bias = randoms(device, (3, 15, 1), (3, 15, C), (C,), (C,))
    for spread in (0, 1e-6, 1e-4):
        x = rows + spread * noise
        check(name, lambda *args: ops.add_norm(*args, 1e-6), [x, torch.zeros_like(x), weight, bias], tolerance=3e-5)
        if name == "triton":
            check(name, lambda *args: ops.layer_norm(*args, 1e-6), [x, weight, bias], learns=False, tolerance=3e-5)
            check(name, lambda x, scores, w, b: ops.select_norm(x, scores, 9, w, b, 1e-6), [x, noise[:, 1:, 0], weight, bias], learns=False,
                  tolerance=3e-5)


@pytest.mark.parametrize("B, N", SIZES)
@pytest.mark.parametrize("name, device", TRITON + CUDA)
def test_compaction(name, device, B, N):
    for kept in {0, min(1, N), N}:
        x, keep = *randoms(device, (B, N, 3)), torch.arange(N, device=device).expand(B, N) >= N - kept
        check(name, lambda x, keep: ops.compact_tokens(x, keep, capacity=keep.numel()), [x, keep], tolerance=0)
        with backend("reference"):
            rows, ends = ops.compact_tokens(x, keep, capacity=keep.numel())
        check(name, ops.expand_rows, [rows, ends, keep], tolerance=0)


@pytest.mark.parametrize("B, N", SIZES)
@pytest.mark.parametrize("name, device", TRITON)
def test_predictor(name, device, B, N):
    x, = randoms(device, (B, N, 16))
    of = {torch.float32: TokenPredictor(16).to(device)}
    of[torch.float64] = TokenPredictor(16).to(device, torch.float64)
    of[torch.float64].load_state_dict(of[torch.float32].state_dict())
    for kept in {0, min(1, N), N}:
        mask = torch.arange(N, device=device).expand(B, N) >= N - kept
        check(name, lambda x, mask: ops.score_tokens(x, of[x.dtype], mask), [x, mask], learns=False)


@pytest.mark.parametrize("name, device", TRITON)
def test_predictor_of_equal_values(name, device):
    """As the norms: rounding of the mean is not to be seen."""
    rows, mask = *randoms(device, (2, 99, 1)), torch.ones(2, 99, dtype=torch.bool, device=device)
    of = {torch.float64: TokenPredictor(236).to(device, torch.float64)}
    of[torch.float64].in_conv[0].weight.data *= 1000
    of[torch.float32] = copy.deepcopy(of[torch.float64]).float()
    of[torch.float64].load_state_dict(of[torch.float32].state_dict())
    check(name, lambda x, mask: ops.score_tokens(x, of[x.dtype], mask), [rows.expand(2, 99, 236).contiguous(), mask], learns=False)


@pytest.mark.parametrize("B, N", [s for s in SIZES if s[1] < 500])
@pytest.mark.parametrize("name, device", TRITON + CUDA)
def test_sliced_products(name, device, B, N):
    """Heads and hidden blocks: none, one, all."""
    x, hidden, w1, b1, w2, b2 = randoms(device, (B, N, 24), (B, N, 48), (48, 24), (48,), (24, 48), (24,))
    for ids in ([], [2], [2, 0, 1]):
        live = torch.tensor(ids, dtype=torch.int32, device=device)
        check(name, lambda *args: ops.sliced_linear(*args, side="out", width=16), [x, w1, b1, live])
        check(name, lambda *args: ops.sliced_linear(*args, side="in", width=16), [hidden[..., :16 * len(ids)], w2, b2, live])
        check(name, lambda *args: ops.sliced_mlp(*args[:6], width=16, residual=args[6]), [x, w1, b1, w2, b2, live, x])


@pytest.mark.parametrize("hidden, C", [(0, 8), (1, 8), (7, 8), (8, 7), (1536, 24), (3072, 16)])
@pytest.mark.parametrize("name, device", TRITON + CUDA)
def test_hidden_units(name, device, hidden, C):
    x, w1, b1, w2, b2 = randoms(device, (2, 3, C), (hidden, C), (hidden,), (C, hidden), (C,))
    args = [x, w1 / C ** 0.5, b1, w2 / max(hidden, 1) ** 0.5, b2]
    check(name, lambda *args: ops.sliced_mlp(*args, None), args)
    if hidden % 64 == 0:
        last = torch.tensor([hidden // 64 - 1] if hidden else [], dtype=torch.int32, device=device)
        check(name, lambda *args: ops.sliced_mlp(*args, last), args)


@pytest.mark.parametrize("B, H, N", [(0, 1, 5), (2, 0, 5), (2, 1, 0)])
@pytest.mark.parametrize("device", [pytest.param("cpu"), DEVICES[1]])
def test_empty_attention(device, B, H, N):
    """Answered before a kernel is chosen."""
    q, k, v, policy = randoms(device, *3 * [(B, H, N, 32)], (B, N))
    check("reference", lambda *args: ops.policy_attention(*args), [q, k, v, policy])


@pytest.mark.parametrize("D", [32, 48, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("device", [pytest.param("cpu"), DEVICES[1]])
def test_a_width_that_a_kernel_refuses_is_served_by_the_next(device, D):
    """Each backend of both attentions serves the width or says why not, and somebody serves."""
    q, k, v, policy, qkv = randoms(device, *3 * [(2, 2, 17, D)], (2, 17), (2, 17, 6 * D))
    for op, function, args in (("policy_attention", ops.policy_attention, [q, k, v, policy.abs()]),
                               ("short_attention", lambda qkv: ops.short_attention(qkv, num_heads=2), [qkv])):
        with backend("reference"):
            expected = function(*(a.double() for a in args))
        torch.testing.assert_close(function(*args).double(), expected, rtol=1e-4, atol=1e-4)
        facts = {"fits": D % 16 == 0, "grad": False}
        for name, reason in registry.table(op, torch.device(device), **facts).items():
            with backend(name), torch.no_grad():
                if reason:
                    with pytest.raises(RuntimeError, match="cannot run here"):
                        function(*args)
                else:
                    torch.testing.assert_close(function(*args).double(), expected, rtol=1e-4, atol=1e-4)
        if D == 72:
            pytest.importorskip("triton")
            from vitprune.kernels import policy_attention, short_attention
            module = policy_attention if op == "policy_attention" else short_attention
            assert "multiple of 16" in module.refuses(torch.device(device), torch.float32, fits=False)


@pytest.mark.parametrize("x, weight", [(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float64, torch.float32),
                                       (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
@pytest.mark.parametrize("device", [pytest.param("cpu"), DEVICES[1]])
def test_norms_of_mixed_dtypes(device, x, weight):
    """The plain forms compute in a wide one, as float64 rounded once shows, and keep the dtype of x."""
    values, residual, w, b = randoms(device, (8, 25, 8), (8, 25, 8), (8,), (8,))
    values, residual, w, b = values.to(x), residual.to(x), w.to(weight), b.to(weight)
    with backend("reference"):
        got = ops.layer_norm(values, w, b, 1e-6)
        total, also = ops.add_norm(values, residual, w, b, 1e-6)
    assert got.dtype == also.dtype == total.dtype == x
    for found, of in ((got, values), (also, total)):
        wide = F.layer_norm(of.double(), (8,), w.double(), b.double(), 1e-6)
        torch.testing.assert_close(found.double(), wide, rtol=2 * torch.finfo(x).eps, atol=16 * torch.finfo(x).eps)
        assert x.itemsize > 2 or (found == wide.to(x)).double().mean() > 0.99
