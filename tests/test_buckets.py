"""How often Triton compiles anew: sizes of a bucket launch the same code, or one other."""
import importlib
from collections import defaultdict

import pytest
import torch
from kernel_checks import INTERPRETED, record

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
SIZES = [(B, N) for B in (2, 3, 32) for N in range(193, 209)]  # lengths that round up to one multiple of 16


def code(kernel, args, options: dict) -> str:
    """What Triton compiles a launch for: constants, types, and which integers are 1 or divisible by 16."""
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    seen = [options.get("num_warps"), options.get("num_stages")]
    for p in kernel.params:
        v = values[p.name]
        if isinstance(v, torch.Tensor):
            seen.append((v.dtype, v.storage_offset() * v.element_size() % 16 == 0))
        elif p.is_constexpr or v is None or isinstance(v, bool):
            seen.append(v)
        elif isinstance(v, int):
            seen.append((v.bit_length() > 31, None if p.do_not_specialize else "one" if v == 1 else v % 16 == 0))
    return str(seen)


def half(*shape, dtype=torch.float16):
    return torch.empty(*shape, dtype=dtype)


def policy(forward, backward, B, N):
    q, k, v = half(B, N, 3, 6, 64).permute(2, 0, 3, 1, 4).unbind(0)
    rows = torch.empty(B, 6, N)
    forward.launch(q, k, v, half(B, N), 0.125, 1e-6)
    backward.launch(q, q, k, v, half(B, N), q, rows, rows, 0.125, 1e-6)


def sliced(linear, mlp, B, N):
    x, square, w1, live = half(B, N, 384), half(384, 384), half(1536, 384), half(3, dtype=torch.int32)
    linear.launch(x, square, None, live, "out", 64)
    linear.launch_backward(half(B, N, 192), x, square, live, "out", 64)
    mlp.launch(x, w1, half(1536), w1.t(), half(384), live, x, 64)
    mlp.launch_backward(x, x, w1, half(1536), w1.t(), live, 64)


def short(forward, backward, B, N):
    qkv, ends = half(B, N, 3 * 384), half(B + 1, dtype=torch.int32)
    for x, cu_seqlens in ((qkv, None), (qkv.flatten(0, 1), ends)):
        forward.launch(x, 6, cu_seqlens, N, 0.125)
        backward.launch(x[..., :384], x, 6, cu_seqlens, N, 0.125)


def select(module, B, N):
    for k in (N // 3, int(0.7 * N)):
        module.launch(half(B, N, 384), half(B, N - 1), k, 1)
        module.launch_backward(half(B, k + 1, 384), half(B, k, dtype=torch.int64), 1, N)


def select_norm(module, B, N):
    for k in (N // 3, int(0.7 * N)):
        module.launch(half(B, N, 384), half(B, N - 1), k, half(384), half(384), 1e-6, 1)


def compact(module, B, N):
    keep = half(B, N, dtype=torch.bool)
    module.launch(half(B, N, 384), keep, B * N)
    module.launch_expand(half(B * N, 384), half(B + 1, dtype=torch.int32), keep, 0.0)


def norm(add_norm, layer_norm, B, N):
    x, w = half(B, N, 384), half(384)
    add_norm.launch(x, x, w, w, None, 1e-6)
    add_norm.launch_backward(x, x, x, x, w, None, 1e-6)
    layer_norm.launch(x, w, w, 1e-6)


def score(module, B, N):
    C, w = 384, half
    module.launch(half(B, N, C), w(C), w(C), 1e-6, w(C, C), w(C), w(C // 2, C), w(C // 2), w(C // 4, C // 2), w(C // 4), w(2, C // 4), w(2),
                  half(B, N, dtype=torch.bool))


@pytest.mark.parametrize("call, names", [
    (policy, ("policy_attention", "policy_attention_backward")),
    (short, ("short_attention", "short_attention_backward")), (select, ("select_tokens",)), (select_norm, ("select_norm",)),
    (compact, ("compact_tokens",)),
    (norm, ("add_norm", "layer_norm")), (score, ("score_tokens",)),
    (sliced, ("sliced_linear", "sliced_mlp", "sliced_product", "sliced_product_large"))], ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("arch", [75, 80, 90])
def test_compiles_once_more_at_most(call, names, arch, monkeypatch):
    pytest.importorskip("triton")
    modules = [importlib.import_module(f"vitprune.kernels.{name}") for name in names]
    monkeypatch.setattr(modules[0].configs, "capability", lambda device: arch)
    codes = defaultdict(set)
    with torch.device("meta"):
        for B, N in SIZES:
            launches = record(monkeypatch, tuple(modules), lambda B=B, N=N: call(*modules[:2], B, N))
            nth = defaultdict(int)
            for kernel, args, options in launches:
                nth[kernel] += 1
                rows = B if call is sliced else None  # tiles of products grow with the rows, of which a bucket is one batch
                codes[kernel.fn.__name__, nth[kernel], rows].add(code(kernel, args, options))
    assert codes and all(len(seen) <= 2 for seen in codes.values()), {place: len(seen) for place, seen in codes.items()}
