"""short_attention: the definition, the library's form, and C++."""
import re

import numpy as np
import pytest
import torch
from kernel_checks import CPP, CUDA, INTERPRETED
from oracles import attention, check_operator

from vitprune import ops
from vitprune.ops import dispatch, registry
from vitprune.ops.registry import choose

BACKENDS = ["reference", "library"]
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


@pytest.mark.parametrize("name, device", [pytest.param("cpp", "cpu", marks=CPP), *CUDA])
@pytest.mark.parametrize("shape, strides", [((4, 1, 96), (96, 384, 1)), ((1, 4, 96), (7, 288, 1))])
def test_strides_of_a_single_row_mean_nothing(name, device, shape, strides):
    qkv = torch.randn(1000, device=device).as_strided(shape, strides)
    with torch.no_grad(), ops.backend("reference"):
        expected = ops.short_attention(qkv, num_heads=2)
    with torch.no_grad(), ops.backend(name):
        torch.testing.assert_close(ops.short_attention(qkv, num_heads=2), expected)


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
    facts = {"fits": True, "packed": True, "large": False, "small": False}
    assert choose("short_attention", x.device, x.dtype, **facts) == "library"
    with torch.no_grad():
        assert choose("short_attention", x.device, x.dtype, **facts) == "cpp"


@CPP
def test_the_processor_decides_between_cpp_and_the_library(monkeypatch, request):
    """As measured: PyTorch's products win in float32 on Intel's AVX-512 and in bfloat16 instructions on AMD's, over a dense batch."""
    real = dispatch.cpu
    request.addfinalizer(registry.reload)

    def chosen(vendor, width, dtype, bf16=False, **facts):
        monkeypatch.setattr(dispatch, "cpu", lambda fact: vendor if fact == "vendor_id" else real(fact))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        registry._choose.cache_clear()
        facts = {"fits": True, "packed": False, "large": False, "small": False, **facts}
        with torch.no_grad():
            name = choose("short_attention", torch.device("cpu"), dtype, **facts)
        assert next(iter(registry.table("short_attention", torch.device("cpu"), dtype, **facts))) == name
        return name
    intel, amd = ("GenuineIntel", "AVX512"), ("AuthenticAMD", "AVX512")
    assert chosen(*intel, torch.float32) == "library" and chosen(*intel, torch.float32, packed=True) == "cpp"
    assert chosen("GenuineIntel", "AVX2", torch.float32) == chosen(*amd, torch.float32) == "cpp"
    assert chosen(*amd, torch.bfloat16, bf16=True) == "library" and chosen(*amd, torch.bfloat16, bf16=True, small=True) == "cpp"
    assert chosen(*intel, torch.bfloat16, bf16=True) == chosen(*amd, torch.bfloat16) == "cpp"
