"""The compiled backends: the C++ extension `_native`, and CUDA kernels from shipped cubins or NVRTC."""
import functools
import importlib
import os
from pathlib import Path

import torch

from .. import nvrtc

try:
    _native, _missing = importlib.import_module(f"{__package__.rpartition('.')[0]}._native"), None
except ImportError as error:  # installed without a C++ compiler, or on a system the extension is not built for
    _native, _missing = None, f"the C++ extension is not installed ({error}): reinstall where a C++ compiler is found"

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # ScoreType in csrc/params.h

KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}  # in the names of CUDA kernels

# Cards that share a chip with their CPU: only since CUDA 13.2 do they run the machine code of others, and no other card runs theirs.
JETSONS = {(5, 3), (6, 2), (7, 2), (8, 7), (8, 8), (10, 1), (11, 0)}


def reason_cpp(device: torch.device) -> str | None:
    """Why the C++ backends cannot serve that device, or None."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    return _missing


def reason_cuda(device: torch.device, op: str) -> str | None:
    """Why the CUDA C++ backend of operator `op` cannot serve that device, or None."""
    if device.type != "cuda":
        return f"runs on an NVIDIA GPU, not on {device.type}"
    if torch.version.hip:
        return "runs on an NVIDIA GPU; this torch is built for ROCm"
    if _missing:
        return _missing
    if forced() and nvrtc.library() is None:
        return f"{nvrtc.MISSING}, and VITPRUNE_CUDA_ARCH needs it"
    if nvrtc.library() is None and cubin_path(op, capability(device)) is None:
        return f"{nvrtc.MISSING}, and no cubin was built for this card when installed"
    return None


def forced() -> int | None:
    """VITPRUNE_CUDA_ARCH (61, 75, ...): an older card, whose code is compiled to PTX for this one; None where it is not set.

    Raises ValueError for anything else.
    """
    asked = os.environ.get("VITPRUNE_CUDA_ARCH")
    if not asked:
        return None
    known = nvrtc.architectures() if nvrtc.library() else []
    if not asked.isdecimal() or (known and int(asked) not in known):
        raise ValueError(f"VITPRUNE_CUDA_ARCH must be an architecture that NVRTC compiles for ({' '.join(map(str, known)) or '75 ...'}), "
                         f"got {asked!r}")
    return int(asked)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability whose code runs there: the card's, or the one that is forced; ValueError where that is a newer card's."""
    own, arch = torch.cuda.get_device_capability(device), forced()
    if arch and divmod(arch, 10) > own:
        raise ValueError(f"VITPRUNE_CUDA_ARCH must be at most {own[0]}{own[1]} on this card, got '{arch}'")
    return divmod(arch, 10) if arch else own


def driver_version() -> int:
    """The newest CUDA that the installed driver supports, 13020 for 13.2; 0 where that is not known."""
    return _native.driver_version() if _native else 0


def cubins() -> dict[str, list[str]]:
    """Architectures of the cubins that came with the install, by operator."""
    found: dict[str, list[str]] = {}
    for path in sorted(_cubin_folder().glob("*.cubin")) if _native else ():
        op, arch, _ = path.name.rsplit(".", 2)
        found.setdefault(op, []).append(arch)
    return found


def cubin_path(op: str, capability: tuple[int, int]) -> Path | None:
    """The shipped cubin that a card of that compute capability runs: same major, the highest minor up to its own; a Jetson only its own."""
    major, minor = capability
    minors = [minor] if capability in JETSONS else [m for m in range(minor, -1, -1) if (major, m) not in JETSONS]
    candidates = (_cubin_folder() / f"{op}.sm{major}{m}.cubin" for m in minors) if _native else ()
    return next((path for path in candidates if path.is_file()), None)


def _cubin_folder() -> Path:  # beside the extension: an editable install keeps both away from the sources
    return Path(_native.__file__).parent / "cubins"


@functools.cache
def kernel(op: str, name: str, index: int):
    """Kernel `name` of csrc/cuda/`op`.cu, loaded on CUDA device `index`.

    Raises RuntimeError naming the kernel and what failed.
    """
    if older := forced():
        return _native.load_kernel(nvrtc.compiled(op, f"compute_{older}"), name, index)
    if path := cubin_path(op, capability(index)):
        try:
            return _native.load_kernel(path.read_bytes(), name, index)
        except RuntimeError:  # of a newer CUDA than this driver's; torch's NVRTC suits the driver
            if nvrtc.library() is None:
                raise
    return _native.load_kernel(nvrtc.compiled(op, nvrtc.target(capability(index))), name, index)


@functools.cache
def processors(index: int) -> int:
    """Multiprocessors of CUDA device `index`."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def require(op: str, condition: bool, *tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError unless the condition holds: kernels know only addresses, and a traced graph brings tensors of other kinds, sizes
    and devices than what it was traced with to the backend that was chosen then."""
    if not condition:
        given = ", ".join("none" if t is None else f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors)
        raise RuntimeError(f"{op}: the kernel that was chosen does not take tensors like these: {given}")


def launch(op: str, name: str, grid: tuple[int, int], threads: int, params, device: torch.device) -> None:
    """One launch of kernel `name` of csrc/cuda/`op`.cu on the device's current stream; nothing where the grid is empty."""
    if grid[0] and grid[1]:
        stream = torch._C._cuda_getCurrentRawStream(device.index)  # torch.cuda.current_stream wraps it in microseconds of Python
        _native.launch(kernel(op, name, device.index), *grid, threads, stream, params)
