import numpy as np
import pytest
import torch
from oracles import attention, check_operator

from vitprune import ops

BACKENDS = ["reference", "library"]


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
