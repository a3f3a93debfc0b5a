"""What holds for every test: nothing that was tuned on this machine; and for kernels under Triton's interpreter."""
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import INTERPRETED, compile_launch

from vitprune import native
from vitprune.ops import registry

ROOT = Path(__file__).parents[1]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # on a GPU cuBLAS refuses to run under `poison` without


def pytest_terminal_summary(terminalreporter):
    """What passing tests of operators print: how their random cases spread, and what their kernels take of a card."""
    for report in terminalreporter.stats.get("passed", ()):
        stem = Path(report.nodeid.partition("::")[0]).stem
        if stem.removeprefix("test_").removesuffix("_kernels") in {*registry.TABLES, "cuda", "shipped_configs"}:
            for line in filter(None, report.capstdout.splitlines()):
                terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}  {line}")


@pytest.fixture(autouse=True, scope="session")
def _untuned(tmp_path_factory):
    """`vitprune tune` may have been run here; tests see the operators' own order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """A graph keeps the backend it was traced with, and torch.compile knows functions by their code: a test of another backend would get
    that graph."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=INTERPRETED, scope="session")
def _interpreter():
    """Triton's interpreter as these tests need it."""
    import interpreter
    with pytest.MonkeyPatch.context() as patch:
        interpreter.round_to_nearest(patch)
        interpreter.hasten(patch)
        yield


@pytest.fixture
def poison():
    """Uninitialised memory is NaN, so a value that a kernel forgot to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory):
    """(source, architecture) -> its CUDA kernels as a library that the CPU runs (tests/emulator.cpp), under a driver of ours."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or torch.cuda.is_available():
        pytest.skip("no C++ compiler" if compiler is None else "a GPU is here: the real driver is loaded")
    folder = tmp_path_factory.mktemp("emulated")
    common = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    driver = folder / "libcuda.so.1"
    subprocess.run([*common, "-Wl,-soname,libcuda.so.1", "-o", driver, ROOT / "tests/fake_driver.cpp", "-ldl"], check=True)
    ctypes.CDLL(driver, mode=ctypes.RTLD_GLOBAL)

    @functools.cache
    def library(source: Path, arch: int) -> Path:
        params, = set(re.findall(r"\(const (\w+Params) p\)", source.read_text()))
        checks = ["-fsanitize=alignment,signed-integer-overflow,bounds", "-fsanitize-undefined-trap-on-error"]
        path = folder / f"{source.stem}.{arch}.so"
        subprocess.run([*common, *checks, f"-D__CUDA_ARCH__={arch}0", f"-DPARAMS={params}", f'-DKERNEL="{source}"', "-I", ROOT / "csrc",
                        "-o", path, ROOT / "tests/emulator.cpp"], check=True)
        return path
    return library


@pytest.fixture
def emulate(cuda_library, monkeypatch):
    """emulate(arch): from now on the CUDA backends serve CPU tensors, with the code of that architecture."""
    def start(arch: int) -> None:
        @functools.cache
        def kernel(op: str, name: str):
            return native._native.load_kernel(str(cuda_library(ROOT / f"csrc/cuda/{op}.cu", arch)).encode(), name, 0)

        def launch(op: str, name: str, grid, threads: int, params, device) -> None:
            if grid[0] and grid[1]:
                native._native.launch(kernel(op, name), *grid, threads, 0, params)
        monkeypatch.setattr(native, "launch", launch)
        monkeypatch.setattr(native, "processors", lambda index: 4)
        monkeypatch.setattr(native, "reason_cuda", lambda device, op: None)
        monkeypatch.setattr(native, "capability", lambda device: divmod(arch, 10))
        registry.reload()
    yield start
    monkeypatch.undo()
    registry.reload()


@pytest.fixture
def compile_for(monkeypatch):
    """compile_for(arch): from now on Triton's kernels serve CPU tensors, as compiled for that architecture (tests/ptx)."""
    import ptx
    import triton

    from vitprune import kernels

    def start(arch: int) -> None:
        def launch(kernel, grid):
            def run(*args, **options):
                built = compile_launch(kernel, args, options, arch)
                ptx.run(built["ptx"], built["values"], grid, 32 * built["warps"], built["shared"])
            return run
        monkeypatch.setattr(triton.runtime.JITFunction, "__getitem__", launch)
        monkeypatch.setattr(kernels, "reason", lambda device: None)
        monkeypatch.setattr(kernels.configs, "capability", lambda device: arch)
        registry.reload()
    yield start
    monkeypatch.undo()
    registry.reload()


@pytest.fixture(autouse=True)
def _emulated(request):
    """What is marked as emulated runs the CUDA kernels on the CPU, what is marked as compiled those of Triton."""
    for name, fixture in (("emulated", "emulate"), ("compiled", "compile_for")):
        if mark := request.node.get_closest_marker(name):
            request.getfixturevalue(fixture)(*mark.args)
