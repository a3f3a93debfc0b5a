"""Triton's kernels as backends. Their files are imported when they are first asked for: Triton is slow to import."""
import functools
import importlib
from collections.abc import Callable
from types import ModuleType

from .. import kernels
from .registry import Backend, interpreted


def triton(file: str, launch: str = "launch", yields: Callable[..., bool] = interpreted) -> Backend:
    """The backend that runs `launch` of vitprune/kernels/FILE.py where Triton and that file's `refuses` allow it."""
    def run(*args):
        return getattr(kernel(file), launch)(*args)
    run.__module__ = _name(file)  # where launch configurations look for what they are checked by

    def refuses(device, dtype, **facts) -> str | None:
        return kernels.reason(device) or kernel(file).refuses(device, dtype, **facts)

    return Backend("triton", run, refuses=refuses, yields=yields)


@functools.cache
def kernel(file: str) -> ModuleType:
    """vitprune/kernels/FILE.py."""
    return importlib.import_module(_name(file))


def _name(file: str) -> str:
    return f"{kernels.__name__}.{file}"
