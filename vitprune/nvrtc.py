"""CUDA sources compiled at first use, by the NVRTC that every CUDA build of torch brings, and cached on disk."""
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch

MISSING = "no NVRTC library is found (CUDA builds of torch bring one, in nvidia-cuda-nvrtc)"
SEAL = hashlib.sha256().digest_size  # bytes at the end of a cached image that prove it whole
_HERE = Path(__file__).parent
SOURCES = next((p for p in (_HERE / "csrc", _HERE.parent / "csrc") if p.is_dir()), None)  # installed; editable install


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC, of torch's own CUDA version where several are installed; None where there is none."""
    for path in candidates():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path)
    return None


def candidates() -> list[str]:
    """Where NVRTC may lie, the likeliest first: beside torch, then wherever the system's loader looks."""
    major = (torch.version.cuda or "").split(".")[0]
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    files = [f for folder in folders for f in folder.glob("*/lib/libnvrtc.so.*")]
    files += (Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*")
    files = [f for f in files if "builtins" not in f.name]
    files.sort(key=lambda f: not f.name.endswith(f".{major}"))
    return [*map(str, files), f"libnvrtc.so.{major}" if major else "libnvrtc.so", "libnvrtc.so"]


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


@functools.cache
def architectures() -> list[int]:
    """The architectures NVRTC compiles for, ascending: 75, 80, ..."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    archs = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(archs), "nvrtcGetSupportedArchs")
    return sorted(archs)


def target(capability: tuple[int, int]) -> str:
    """NVRTC's name for what a card of that compute capability runs: its own machine code, or PTX of an older card.

    Raises RuntimeError for a card older than everything NVRTC knows.
    """
    own = capability[0] * 10 + capability[1]
    if own in architectures():
        return f"sm_{own}"
    older = [arch for arch in architectures() if arch < own]
    if not older:
        raise RuntimeError(f"NVRTC {'.'.join(map(str, version()))} has no target for compute capability "
                           f"{'.'.join(map(str, capability))}; the oldest it knows is {architectures()[0] / 10}")
    return f"compute_{older[-1]}"


def compiled(op: str, arch: str) -> bytes:
    """The image of operator `op` for that `target`, from the cache where it has been compiled before."""
    source, headers = sources(op)
    text = repr((source, sorted(headers.items())))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_folder() / f"{op}.{arch}.nvrtc{'.'.join(map(str, version()))}.{digest}.bin"
    with contextlib.suppress(OSError):
        image, seal = (content := path.read_bytes())[:-SEAL], content[-SEAL:]
        if image and seal == hashlib.sha256(image).digest():  # else a disk or a crash damaged it: compile anew
            return image
    print(f"vitprune: compiling {op} for {arch}, which takes up to a quarter of a minute", file=sys.stderr, flush=True)
    image, _ = build(op, source, headers, arch)
    with contextlib.suppress(OSError):  # a folder that cannot be written costs a compilation per process
        write(path, image + hashlib.sha256(image).digest())
    return image


def cache_folder() -> Path:
    """VITPRUNE_CACHE, or vitprune/ in the user's cache folder; one that holds nothing for a user without a home."""
    if folder := os.environ.get("VITPRUNE_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitprune"
    except RuntimeError:  # a container's user may have none
        return Path(os.devnull) / "vitprune"


def write(path: Path, image: bytes) -> None:
    """Whole or not at all: another process may be writing the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(image)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def sources(op: str) -> tuple[str, dict[str, str]]:
    """The CUDA source of an operator and every header by name."""
    if SOURCES is None:
        raise RuntimeError(f"{op}: the CUDA sources are missing from this installation (vitprune/csrc)")
    headers = (path for folder in (SOURCES, SOURCES / "cuda") for path in folder.glob("*.h"))
    return (SOURCES / "cuda" / f"{op}.cu").read_text(), {path.name: path.read_text() for path in headers}


def build(op: str, source: str, headers: dict[str, str], arch: str) -> tuple[bytes, str]:
    """Compile for `arch`: a cubin for sm_XX, PTX for compute_XX; and the compiler's log. Raises RuntimeError with the log."""
    lib, program = library(), ctypes.c_void_p()
    if lib is None:
        raise RuntimeError(f"{op}: {MISSING}")
    n = len(headers)
    texts = (ctypes.c_char_p * n)(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * n)(*(name.encode() for name in headers))
    _check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{op}.cu".encode(), n, texts, names), op)
    try:
        options = [b"--gpu-architecture=" + arch.encode(), b"--std=c++17"]
        result = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _get(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program, op).rstrip(b"\0\n").decode()
        if result != 0:
            raise RuntimeError(f"{op}: NVRTC failed for {arch}: {_text(result)}\n{log}")
        if arch.startswith("sm_"):
            return _get(lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN, program, op), log
        return _get(lib.nvrtcGetPTXSize, lib.nvrtcGetPTX, program, op), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _get(size_of, read, program, op: str) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), op)
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer), op)
    return buffer.raw


def _text(result: int) -> str:
    library().nvrtcGetErrorString.restype = ctypes.c_char_p
    return library().nvrtcGetErrorString(result).decode()


def _check(result: int, what: str) -> None:
    if result != 0:
        raise RuntimeError(f"{what}: NVRTC failed: {_text(result)}")
