"""How often Triton compiles anew: sizes of a bucket launch the same code, or one other."""
import importlib
from collections import defaultdict

import pytest
import torch
from kernel_checks import INTERPRETED, record
from launches import CALLS, sliced

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


@pytest.mark.parametrize("call, names", CALLS, ids=lambda value: getattr(value, "__name__", ""))
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
