"""What the tests of every kernel share: random cases, memory layouts, and compilation for cards that are not here."""
import contextlib
import importlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from vitprune import cases
from vitprune.cases import Size
from vitprune.native import reason_cpp
from vitprune.ops import backend, registry

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [pytest.param("cpu", marks=[pytest.mark.interpreter, pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")]),
           pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU"))]
CPP = pytest.mark.skipif(INTERPRETED or reason_cpp(torch.device("cpu")) is not None, reason="no C++ extension")
ARCHS = (75, 80, 86, 89, 90, 100, 120)
SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may have


def kernels(*names: str, **cpu) -> list:
    """Parameters (backend, device): those backends on every device that runs them here, and the CPU's own, each with its mark."""
    return [pytest.param(name, *device.values, marks=device.marks) for name in names for device in DEVICES] + \
        [pytest.param(name, "cpu", marks=mark) for name, mark in cpu.items()]


# Parameters (backend, device) of CUDA C++: on a GPU; and emulated as cards without tensor cores, with Turing's, and with Ampere's.
CUDA = [pytest.param("cuda", "cuda", marks=DEVICES[1].marks),
        *(pytest.param("cuda", "cpu", marks=[CPP, pytest.mark.emulated(arch)], id=f"emulated-{arch}") for arch in (61, 75, 80))]
# Parameters (backend, device) of Triton's kernels as compiled for cards that are not here.
COMPILED = [pytest.param("triton", "cpu", id=f"compiled-{arch}", marks=[
    pytest.mark.compiled(arch), *[pytest.mark.long] * (arch in (80, 120)),
    pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="kernels run by themselves")]) for arch in (75, 80, 90, 120)]


ON_CARD = torch.cuda.is_available() and not INTERPRETED
VARIANTS = 12  # of what attention is compiled for, in random cases on a card, whose compiler has seconds of work in each


class Part(int):
    """How many of the random cases a test has, which others have more of."""
    seed = 0


def counts(some: int, many: int) -> list:
    """Numbers of random cases, for `make test` and `make test-long`. Many, and those in each of which a card's compiler has its work,
    are spread over several tests, which can run beside each other."""
    def parts(cases: int, number: int) -> list[Part]:
        found = [Part(cases // number) for _ in range(number)]
        for i, part in enumerate(found):
            part.seed = i
        return found

    return [*(parts(some, 8) if ON_CARD else [some]), *(pytest.param(part, marks=pytest.mark.long) for part in parts(many, 20))]


def seeds(count: int) -> range:
    """So many seeds of cases, other ones for each part of a test."""
    first = getattr(count, "seed", 0) * count
    return range(first, first + count)


def explore(check, small, real, count: int, describe) -> None:
    """check(case) on `count` cases: a fifth from the strategy `real`, the rest from `small`; prints how they spread."""
    spread: Counter = Counter()
    for strategy, examples in ((real, count // 5), (small, count - count // 5)):
        @(seed(count.seed) if isinstance(count, Part) else lambda run: run)
        @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def run(case):
            spread.update(describe(case))
            spread["cases"] += 1
            check(case)
        run()
    print(dict(sorted(spread.items())))


def layout(t: torch.Tensor, rng: np.random.Generator, kind: int | None = None) -> torch.Tensor:
    """The same values (or one image's, repeated) under other strides and offsets; of that kind, 0 to 4, or of any."""
    kind = rng.integers(0, 5) if kind is None else kind
    if kind == 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2:  # every second element of a larger tensor, from an odd offset
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), 7)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if kind == 3 and t.shape[0]:
        return t[:1].expand(t.shape)
    if kind == 4:  # rows of a wider tensor, as after a fused projection
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), 7)
        wide[..., 3:] = t
        return wide[..., 3:]
    return t


# Tiles of the products of `sliced_mlp` and `sliced_linear`: the default ones; others; those of many rows, whatever their number.
_NAMES = [f"{of}{size}" for of in ("", "weight_") for size in ("rows", "columns", "depth")]
PRODUCTS = ({}, *(dict(zip(_NAMES, tile)) for tile in ((128, 64, 64, 64, 128, 64), (64, 128, 32, 128, 64, 128), (256, 64, 64, 64, 64, 64))),
            {"large_rows": 1})


def product_tiles(real: bool) -> tuple[int, ...]:
    """Which of them to draw from: a card compiles each anew; the default ones take longest to interpret; tensor descriptors (4) are not run
    as compiled without a card."""
    return (0, 4) if ON_CARD else (0, 1, 2, 3) if not INTERPRETED else (1, 2, 3, 1, 2, 3, 0, 4) if real else (0, 1, 2, 3, 4, 4)


def tiled(kernel: str, config: dict):
    """Launches of that module of kernels take these entries instead of the default ones."""
    if not config:
        return contextlib.nullcontext()
    module = importlib.import_module(f"vitprune.kernels.{kernel}")
    return mock.patch.object(module, "default", lambda *args, default=module.default, **shape: default(*args, **shape) | config)


class Recorder:
    """Stands in for a @triton.jit function: keeps what it was launched with instead of launching it."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


def record(monkeypatch, modules, call) -> list[tuple]:
    """(kernel, args, options) of every launch of a kernel of `modules`, one or several, while call() runs; nothing is launched."""
    import triton
    modules = modules if isinstance(modules, tuple) else (modules,)
    recorders = {(module, name): Recorder(f) for module in modules for name, f in vars(module).items()
                 if isinstance(f, triton.runtime.JITFunction)}
    with monkeypatch.context() as patch:
        for (module, name), recorder in recorders.items():
            patch.setattr(module, name, recorder)
        call()
    return [(r.kernel, *launch) for r in recorders.values() for launch in r.launches]


def compile_launch(kernel, args, options: dict, arch: int) -> dict:
    """Compiles a recorded launch for `arch` as Triton would, and prints what it takes.

    Returns {"registers", "spills" (bytes), "shared", "ptx", "cubin", "values" (the arguments that remain), "warps"}."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type  # the type names of a signature
    tuning = {k: options[k] for k in ("num_warps", "num_stages") if k in options}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        aligned = value.storage_offset() * value.element_size() if isinstance(value, torch.Tensor) else value
        if not free and type(aligned) is int and aligned % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=tuning)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path], capture_output=True, text=True,
                               check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    print(f"{kernel.__name__} sm_{arch}: {found['REG']} registers, {found['STACK'] + found['LOCAL']} B spilled, "
          f"{compiled.metadata.shared} B shared")
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared,
            "ptx": compiled.asm["ptx"], "cubin": compiled.asm["cubin"], "warps": compiled.metadata.num_warps,
            "values": [values[name] for name, kind in signature.items() if kind != "constexpr"]}


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
