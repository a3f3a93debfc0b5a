"""What instructions compute, each of a thread's registers alone."""
import functools
import operator
from functools import partial

import numpy as np

WIDE = {np.dtype(a): b for a, b in ((np.int16, np.int32), (np.uint16, np.uint32), (np.int32, np.int64), (np.uint32, np.uint64))}
COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


def bits(pattern: np.ndarray) -> np.ndarray:
    """bfloat16 as float32."""
    return (pattern.astype(np.uint32) << 16).view(np.float32)


def brain(value: np.ndarray) -> np.ndarray:
    """float32 as the nearest bfloat16's bits."""
    raw = np.ascontiguousarray(value, np.float32).view(np.uint32)
    near = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, near).astype(np.uint16)


def truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division as in C."""
    b = np.where(b == 0, 1, b)
    quotient = np.floor_divide(a, b)
    return quotient + ((a - quotient * b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def shift(of, value: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Clamped at the width, as PTX has it."""
    width = value.dtype.itemsize * 8
    if of is np.right_shift and value.dtype.kind == "i":
        return of(value, np.minimum(count, width - 1).astype(value.dtype))
    return np.where(count < width, of(value, np.minimum(count, width - 1).astype(value.dtype)), 0)


def field(value: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: `length` bits from bit `at` on, of 32; past the last they are zeros or the sign."""
    at, length, wide = np.minimum(at.astype(np.int64), 255), np.minimum(length.astype(np.int64), 255), value.astype(np.int64)
    sign = np.where((value.dtype.kind == "i") & (length > 0), wide >> np.minimum(at + length - 1, 31) & 1, 0)
    low = (np.int64(1) << np.minimum(length, 32)) - 1
    return (np.where(at > 31, -sign, wide >> np.minimum(at, 31)) & low | -sign & ~low).astype(value.dtype)


def fused(a, b, c):
    """fma, in float64 where that holds the product."""
    kind = np.float64 if a.dtype.itemsize > 2 else np.float32
    return (a.astype(kind) * b.astype(kind) + c.astype(kind)).astype(a.dtype)


def most(of, beside, *values):
    """Of two or three; NaN where all are."""
    return functools.reduce(beside if values[0].dtype.kind != "f" else of, values)


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.hi, in integers without bounds."""
    return (a.astype(object) * b.astype(object) >> 8 * a.itemsize).astype(a.dtype)


ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fused, "mad": lambda a, b, c: a * b + c,
    "rem": lambda a, b: a - truncated(a, b) * b, "neg": np.negative, "abs": np.abs,
    "max": partial(most, np.fmax, np.maximum), "min": partial(most, np.fmin, np.minimum),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": partial(shift, np.left_shift), "shr": partial(shift, np.right_shift), "bfe": field,
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a}
