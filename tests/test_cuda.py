"""Every CUDA source for every architecture, with nvcc and with NVRTC: no warning, no spill, tensor cores where they exist."""
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_checks import ARCHS

from vitprune import nvrtc

CSRC = Path(__file__).parents[1] / "csrc"
OPERATORS = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
MATRIX = {"policy_attention", "policy_attention_backward", "short_attention", "sliced_product"} & set(OPERATORS)


def nvcc_architectures() -> list[int]:
    """What nvcc compiles for."""
    if NVCC is None:
        return []
    listed = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [int(arch) for arch in re.findall(r"sm_(\d+)\b", listed)]


def nvrtc_architectures() -> list[int]:
    return nvrtc.architectures() if nvrtc.library() else []


def each(known: list[int]) -> list:
    """ARCHS, and what else the compiler knows from the oldest card on that is served; all but a card of each kind in `make test-long`."""
    quick = (75, 80, 90, 120)
    return [pytest.param(arch, marks=() if arch in quick else pytest.mark.long) for arch in sorted({*known, *ARCHS}) if arch >= 61]


def usage(cubin: bytes, tmp_path) -> dict[str, dict[str, int]]:
    """Resources of each kernel of a cubin; those that Triton's wheel brings a tool for."""
    triton = pytest.importorskip("triton")
    (tmp_path / "read.cubin").write_bytes(cubin)
    text = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", tmp_path / "read.cubin"], capture_output=True,
                          text=True, check=True).stdout
    found = {}
    for name, line in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", text):
        found[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return found


def check(op: str, arch: int, cubin: bytes, tmp_path) -> None:
    assert cubin[:4] == b"\x7fELF"
    kernels = usage(cubin, tmp_path)
    assert kernels
    print(f"\n{op} sm_{arch}: " + ", ".join(f"{name} {u['REG']} registers, {u['SHARED']} B shared" for name, u in kernels.items()))
    for name, used in kernels.items():
        assert used["STACK"] + used["LOCAL"] == 0, f"{name} spills on sm_{arch}: {used}"
    if op in MATRIX and arch >= 75:
        triton = pytest.importorskip("triton")
        sass = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-sass", tmp_path / "read.cubin"], capture_output=True, text=True,
                              check=True).stdout
        halves = [part for part in sass.split("Function : ")[1:] if "f16" in part.split()[0]]
        halves = [part for part in halves if arch >= 80 or "bf16" not in part.split()[0]]
        assert halves
        for part in halves:
            assert "HMMA" in part, f"{part.split()[0]} has no tensor-core instruction on sm_{arch}"


def by_nvrtc(op: str, arch: int) -> bytes:
    """The cubin, of a compiler that had nothing to say but that the card is old."""
    cubin, log = nvrtc.build(op, *nvrtc.sources(op), f"sm_{arch}")
    said = [line for line in log.splitlines() if not re.search("^nvrtc: warning: Architectures prior to .* are deprecated", line)]
    assert not said, "\n".join(said)
    return cubin


@pytest.mark.parametrize("arch", each(nvrtc_architectures()))
@pytest.mark.parametrize("op", OPERATORS)
def test_nvrtc(op, arch, tmp_path):
    if nvrtc.library() is None:
        pytest.skip(nvrtc.MISSING)
    check(op, arch, by_nvrtc(op, arch), tmp_path)


@pytest.mark.parametrize("arch", (61, 70))
@pytest.mark.parametrize("op", OPERATORS)
def test_nvrtc_12(op, arch, tmp_path, monkeypatch):
    """CUDA 13 has no compiler for these cards any more."""
    path = next((path for path in nvrtc.candidates() if path.endswith("/libnvrtc.so.12")), None)
    if path is None:
        pytest.skip("no NVRTC 12 (nvidia-cuda-nvrtc-cu12)")
    library = ctypes.CDLL(path)
    monkeypatch.setattr(nvrtc, "library", lambda: library)
    check(op, arch, by_nvrtc(op, arch), tmp_path)


@pytest.mark.parametrize("arch", each(nvcc_architectures()))
@pytest.mark.parametrize("op", OPERATORS)
def test_nvcc(op, arch, tmp_path):
    if arch not in nvcc_architectures():
        pytest.skip(f"no nvcc that knows sm_{arch}")
    cubin = tmp_path / f"{op}.cubin"
    subprocess.run([NVCC, "-cubin", "-std=c++17", "-Werror", "all-warnings", "-Wno-deprecated-gpu-targets", f"-arch=sm_{arch}", "-I",
                    CSRC, "-o", cubin, CSRC / "cuda" / f"{op}.cu"], check=True)
    check(op, arch, cubin.read_bytes(), tmp_path)
