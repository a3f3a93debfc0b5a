"""Checks of operators' arguments."""
import numbers
import sys
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)  # a look at these costs the host no call
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def check_tensors(op: str, optional: tuple[str, ...] = (), **given) -> None:
    """Every argument must be a tensor, or None where it is optional, and all on the device of the first."""
    first = None
    for name, t in given.items():
        if type(t) not in PLAIN and not isinstance(t, Tensor):
            t is None and name in optional or fail(op, name, "a tensor", f"{t!r:.80}")
        elif first is None:
            first, device = name, t.device
        elif t.device != device:
            fail(op, name, f"on {first}'s device {device}", t.device)


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Every tensor given must be of a dtype that PyTorch computes in."""
    for name, t in tensors.items():
        t is None or t.dtype in FLOATS or fail(op, name, "a float of 16, 32 or 64 bits", t.dtype)


def is_int(value) -> bool:
    """Whether that is an integer, also one of a graph that is being traced; True is none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) or isinstance(value, Tensor) and torch.jit.is_tracing()


def is_number(value) -> bool:
    """Whether that is a real number that no gradient could belong to, as kernels take it: True and fractions are none."""
    if isinstance(value, bool) or isinstance(value, numbers.Rational) and not isinstance(value, numbers.Integral):
        return False
    return isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt))


def is_finite(value) -> bool:
    """Whether that is such a number, neither infinite nor NaN."""
    return (type(value) is float or is_number(value)) and -sys.float_info.max <= value <= sys.float_info.max


def is_eps(value) -> bool:
    """Whether that can be added to a variance."""
    return type(value) is float and 0 <= value < sys.float_info.max or is_finite(value) and value >= 0


def values(t: Tensor) -> list | None:
    """The numbers of a tensor where reading them waits for nothing: on a CPU, outside of what is traced; None elsewhere."""
    if t.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing() or type(t) is not Tensor:
        return None
    return t.tolist()


def fail(op: str, argument: str, expected: str, got) -> NoReturn:
    """Raise ValueError `op: argument must be expected, got got`; written `condition or fail(...)`: its text costs only then."""
    got = tuple(got) if isinstance(got, torch.Size) else got
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")
