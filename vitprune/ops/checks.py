"""Checks of operators' arguments."""
import numbers
from typing import NoReturn

import torch
from torch import Tensor


def on_device(op: str, of: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Every tensor given must be on the device of argument `of`."""
    for name, t in tensors.items():
        t is None or t.device == device or fail(op, name, f"on {of}'s device {device}", t.device)


def is_int(value) -> bool:
    """Whether that is an integer, also one of a graph that is being traced; True is none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) or isinstance(value, Tensor) and torch.jit.is_tracing()


def is_number(value) -> bool:
    """Whether that is a real number that no gradient could belong to."""
    return isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt))


def is_eps(value) -> bool:
    """Whether that can be added to a variance."""
    return type(value) is float and value >= 0 or is_number(value) and value >= 0


def values(t: Tensor) -> list | None:
    """The numbers of a tensor where reading them waits for nothing: on a CPU, outside of what is traced; None elsewhere."""
    if t.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing() or type(t) is not Tensor:
        return None
    return t.tolist()


def fail(op: str, argument: str, expected: str, got) -> NoReturn:
    """Raise ValueError `op: argument must be expected, got got`; written `condition or fail(...)`: its text costs only then."""
    got = tuple(got) if isinstance(got, torch.Size) else got
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")
