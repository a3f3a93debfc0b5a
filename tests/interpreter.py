"""Triton's interpreter, rounding as cards do and twice as fast: it spends its time on types, not on numbers."""
import functools
import operator
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def round_to_nearest(patch) -> None:
    """The interpreter cuts float32 off to bfloat16; cards round to nearest."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, src, kind):
        if src.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, kind.scalar)
        return cast(self, src, kind)
    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


def remember(patch, owner, name: str, key) -> None:
    """A constructor that runs once for each key(arguments)."""
    make, made = getattr(owner, name), {}

    def init(self, *args):
        k = key(*args)
        if k not in made:
            make(self, *args)
            made[k] = dict(vars(self))
        vars(self).update(made[k])
    patch.setattr(owner, name, init)


def remember_shapes(patch) -> None:
    """A tensor's own shape and size are wrapped once for each shape."""
    make, made = tl.tensor.__init__, {}

    def init(self, handle, type):
        k = tuple(type.shape.values) if type.is_block() else ()
        if k not in made:
            make(self, handle, type)
            made[k] = self.numel, self.shape
        self.handle, self.type, self.dtype, (self.numel, self.shape) = handle, type, type.scalar, made[k]
    patch.setattr(tl.tensor, "__init__", init)


def compare_names(patch, kind) -> None:
    """Types of one kind are the same where their names are."""
    long = kind.__eq__

    def equal(a, b):
        return a is b or (a.name == b.name if type(a) is type(b) else long(a, b))
    patch.setattr(kind, "__eq__", equal)


def convert_sooner(patch) -> None:
    """Operands of one type, or a pointer and what is added to it, are only brought to one shape."""
    long, halves = TritonSemantic.binary_op_type_checking_impl, (tl.float16, tl.bfloat16)

    def convert(self, a, b, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if isinstance(a, tl.tensor) and isinstance(b, tl.tensor):
            pointer = a.dtype.is_ptr()
            if allow_lhs_ptr and b.dtype.is_int() if pointer else a.dtype is b.dtype and not (div_or_mod and a.dtype in halves):
                return self.broadcast_impl_value(a, b)
        return long(self, a, b, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
    patch.setattr(TritonSemantic, "binary_op_type_checking_impl", convert)


def call_directly(obj, name: str, member, builder, *scope) -> None:
    """In place of a language function: itself, with its first argument that no kernel gives."""
    function = getattr(member, "__wrapped__", member)

    def called(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)
    setattr(obj, name, called)


shapes = functools.cache(np.broadcast_shapes)


def broadcast(self, *pair) -> list:
    """Both operands in the same shape."""
    given = [tuple(t.type.shape.values) if t.type.is_block() else () for t in pair]
    shape = shapes(*given)
    return [t if s == shape else tl.tensor(interpreter.TensorHandle(np.broadcast_to(t.handle.data, shape), t.dtype),
                                           tl.block_type(t.dtype, list(shape))) for t, s in zip(pair, given, strict=True)]


def no_overflow(self, lhs, rhs, binary_op) -> None:
    """Integers must not overflow; Triton's own check calls eight of its functions for it."""
    if lhs.type.scalar.int_bitwidth < 64:
        result = getattr(operator, binary_op.__name__)(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        least, most = lhs.type.scalar.get_int_min_value(), lhs.type.scalar.get_int_max_value()
        assert result.min() >= least and result.max() <= most, f"{binary_op.__name__} of {lhs.type} overflows"


def hasten(patch) -> None:
    """Keep what the interpreter works out again for every operation; the results are the same."""
    kinds = functools.cache(interpreter._get_np_dtype)
    patch.setattr(interpreter, "_get_np_dtype", lambda kind: np.dtype(np.uint64) if kind.scalar.is_ptr() else kinds(kind.scalar))
    remember(patch, tl.block_type, "__init__", lambda kind, shape: (str(kind), kind.is_const(), *(getattr(n, "value", n) for n in shape)))
    remember_shapes(patch)
    for kind in (tl.dtype, tl.pointer_type, tl.block_type):
        compare_names(patch, kind)
    patch.setattr(interpreter.TensorHandle, "__post_init__", lambda self: None)  # checks again what `_get_np_dtype` gave
    patch.setattr(interpreter, "_patch_attr", call_directly)
    convert_sooner(patch)
    patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast)
    patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", no_overflow)
    # the language is replaced by its interpreted form for good, not anew in every call of a function
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patch.setattr(interpreter, "_patch_lang", lambda fn: SimpleNamespace(restore=lambda: None))
