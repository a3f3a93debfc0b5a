"""Runs PTX, what Triton compiles for a card, on the CPU: all threads of some blocks step by step in NumPy.

What a card would do wrong and its interpreter hides shows: memory outside of every tensor or of what the block has, misaligned accesses,
races of warps in shared memory between two barriers, asynchronous copies and products (wgmma) that are read before they are waited for or
lack a fence, threads that write unequal values to one address, barriers that some threads miss; the compiler's own mistakes too. Not
covered: what the assembler makes of PTX, races within a warp and through global memory, products of 10.0, tensor descriptors, speed."""
import re
from functools import partial

import numpy as np
import torch

from .arithmetic import ARITHMETIC, COMPARE, WIDE, bits, brain, high, most, truncated
from .memory import RAW, WARP, Fault, Memory, names
from .warp import Warps

TYPES = {"pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
         "f16": np.float16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64,
         "s64": np.int64, "f64": np.float64}
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOAT = {"rn", "ftz", "approx", "full"}
MODIFIERS = {  # beside types, of what is computed by a thread alone; with others an instruction is another one
    **dict.fromkeys(("add", "sub", "fma", "neg", "abs", "div", "ex2", "lg2", "sqrt", "rsqrt", "rcp"), _FLOAT),
    **dict.fromkeys(("mul", "mad"), {"lo", "hi", "wide", *_FLOAT}), **dict.fromkeys(("min", "max"), {"NaN", "ftz"}),
    "cvt": {"rn", "ftz", *WHOLE},
    "setp": {"and", "or", "xor", "ftz", "num", "nan", "lo", "ls", "hi", "hs", *(c + u for c in COMPARE for u in ("", "u"))},
    **dict.fromkeys(("not", "and", "or", "xor", "shl", "shr", "bfe", "rem", "mov", "selp", "prmt"), set())}
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}


def instructions(ptx: str) -> tuple[list[tuple], dict[str, int]]:
    """[(predicate or None, opcode, operands)], and where labels are."""
    if "tcgen05" in ptx:
        raise Fault("tcgen05, the products of compute capability 10.0, is unknown")
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1:]
    body = body[:re.search(r"^\}", body, re.M).start()]
    body = re.sub(r"//.*", "", body)
    found, labels = [], {}
    for piece in re.findall(r"\$\w+:|\.(?:loc|file|reg|pragma)[^\n]*|[^;\s][^;]*;", body):
        if piece.startswith("."):
            continue
        if piece.endswith(":"):
            labels[piece[:-1]] = len(found)
            continue
        predicate, code, operands = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*?);", piece, re.S).groups()
        code = code.split(".")
        if strange := {*code[1:]} - MODIFIERS.get(code[0], {*code}) - {*TYPES, *PACKED, "bf16"}:
            raise Fault(f"unknown: {', '.join(sorted(strange))} of {'.'.join(code)}")
        found.append((predicate, code, [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", operands)]))
    return found, labels


class Machine(Warps):
    """Some blocks of a grid, thread by thread: arrays of [blocks * threads]."""

    def __init__(self, code, labels, values: dict, memory: Memory, blocks: np.ndarray, grid, threads: int, shared: int):
        self.code, self.labels, self.values, self.memory = code, labels, values, memory
        self.count, self.threads = len(blocks) * threads, threads
        of = np.repeat(blocks, threads)
        self.block = np.repeat(np.arange(len(blocks)), threads)
        self.warp = np.tile(np.arange(threads) // WARP, len(blocks)).astype(np.int16)
        self.registers = {"%tid.x": np.tile(np.arange(threads, dtype=np.uint32), len(blocks)),
                          "%laneid": np.tile(np.arange(WARP, dtype=np.uint32), self.count // WARP)}
        for axis, name in enumerate("xyz"):
            self.registers[f"%ctaid.{name}"] = (of // int(np.prod(grid[:axis])) % grid[axis]).astype(np.uint32)
            self.registers[f"%nctaid.{name}"] = np.full(self.count, grid[axis], np.uint32)
        self.constants: dict = {}
        self.now = None  # the lanes of the present instruction
        self.prepare(len(blocks), shared)

    # --- registers ---------------------------------------------------------------------------------------------------

    def get(self, name: str, kind: str) -> np.ndarray:
        if name in self.pending and (self.pending[name] if self.now is None else self.pending[name] & self.now).any():
            raise Fault(f"{name}, a product, is read before it was waited for")
        if kind in PACKED or kind == "bf16":
            raw = self.get(name, "b64" if kind == "f32x2" else "b16" if kind == "bf16" else "b32")
            raw = np.broadcast_to(raw, self.count).copy() if raw.size == 1 else raw
            return bits(raw.view(np.uint16)) if "bf16" in kind else raw.view(TYPES[PACKED[kind]])
        dtype = np.dtype(TYPES[kind])
        if name[0] == "%":
            held = self.held(name)
            return held.view(dtype) if held.itemsize == dtype.itemsize else held.astype(RAW[dtype.itemsize]).view(dtype)
        if (name, kind) not in self.constants:
            self.constants[name, kind] = self._constant(name, dtype)
        return self.constants[name, kind]

    def held(self, name: str) -> np.ndarray:
        """What is in a register; what nothing was put into is anything."""
        if name not in self.registers:
            self.put(name, np.array([0xDEADBEEF], np.uint32), None)
        return self.registers[name]

    def _constant(self, name: str, dtype: np.dtype) -> np.ndarray:
        if found := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", name):
            wide = {"f": "<f4", "d": "<f8"}[found[1]]
            return np.frombuffer(bytes.fromhex(found[2])[::-1], wide).astype(dtype if dtype.kind == "f" else wide).view(dtype)
        symbol, _, plus = name.partition("+")
        number = int(plus or 0) if symbol == "global_smem" else int(name.rstrip("U"), 0)
        if dtype == np.bool_:
            return np.array([number != 0])
        return np.array([number & (1 << dtype.itemsize * 8) - 1], RAW[dtype.itemsize]).view(dtype)

    def put(self, name: str, value: np.ndarray, lanes) -> None:
        self.touched.add(name)
        prefix = re.match(r"%[a-z]+", name)[0]
        raw = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%f": np.uint32, "%rd": np.uint64, "%fd": np.uint64}[prefix]
        if raw is np.bool_:
            value = value.astype(np.bool_)
        else:
            size = np.dtype(raw).itemsize
            if value.itemsize != size:
                value = value.astype(f"i{size}" if value.dtype.kind == "i" else f"u{size}")
            value = value.view(raw)
        if lanes is not None:
            value = np.where(lanes, value, self.registers.get(name, raw(0)))
        elif value.size != self.count:
            value = np.broadcast_to(value, self.count)
        self.registers[name] = np.ascontiguousarray(value)

    def result(self, name: str, kind: str, value: np.ndarray, lanes) -> None:
        if "bf16" in kind:
            value = brain(value)
        if kind in PACKED:
            value = np.ascontiguousarray(value).view(np.uint64 if kind == "f32x2" else np.uint32)
        self.put(name, value, lanes)

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """The lowest program counter goes first, so that what has parted meets again."""
        end, at, each = len(self.code), 0, None  # where all threads are, or each of them
        while at < end:
            here = None
            if each is not None:
                at = int(each.min())
                if at == end:
                    return
                here = each == at
                if here.all():
                    here = each = None
            predicate, code, operands = self.code[at]
            lanes = here
            if predicate:
                lanes = self.registers[predicate.lstrip("!")] ^ (predicate[0] == "!")
                lanes = lanes if here is None else lanes & here
                lanes = None if lanes.all() else lanes
            if code[0] in ("bra", "ret", "exit"):
                to = self.labels[operands[0]] if operands else end
                if lanes is None:
                    at, each = to, None
                    continue
                if each is None:
                    each = np.full(self.count, at + 1)
                else:
                    each[here] = at + 1
                each[lanes] = to
                continue
            if lanes is None or lanes.any():
                self.now = lanes
                try:
                    getattr(self, "do_" + code[0], self.arithmetic)(code, operands, lanes)
                except (Fault, KeyError, ValueError) as e:
                    raise Fault(f"{'.'.join(code)} {', '.join(operands)}: {e}") from e
            if each is None:
                at += 1
            else:
                each[here] += 1

    def arithmetic(self, code, operands, lanes) -> None:
        kind, of = code[-1], ARITHMETIC.get(code[0])
        if of is None and code[0] != "div":
            raise Fault("unknown")
        if code[0] == "div":
            of = np.divide if kind[0] == "f" else truncated
        elif code[0] in ("min", "max") and "NaN" in code:
            of = partial(most, *[np.maximum if code[0] == "max" else np.minimum] * 2)
        if len(code) > 2 and code[-2] == "f32" and kind in ("f16", "bf16"):  # halves, and at last a float
            halves = [self.get(name, kind).astype(np.float32) for name in operands[1:-1]]
            return self.put(operands[0], of(*halves, self.get(operands[-1], "f32")), lanes)
        if kind == "pred" and code[0] == "not":
            of = np.logical_not
        kinds = [kind] * (len(operands) - 1)
        if code[0] in ("shl", "shr"):
            kinds[1] = "u32"
        elif code[0] == "bfe":
            kinds[1:] = ["u32", "u32"]
        values = [self.get(name, k) for name, k in zip(operands[1:], kinds)]
        if "wide" in code:
            wide = WIDE[values[0].dtype]
            added = f"u{8 * np.dtype(wide).itemsize}"
            values = [v.astype(wide) for v in values[:2]] + [self.get(o, added).view(wide) for o in operands[3:]]
        elif "hi" in code:
            of = high
        value = of(*values)
        if "ftz" in code and kind == "f32":
            value = np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)
        self.result(operands[0], kind, value, lanes)

    def do_setp(self, code, operands, lanes) -> None:
        kind, name = code[-1], {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(code[1], code[1])
        a, b = self.get(operands[1], kind), self.get(operands[2], kind)
        nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else False
        if name in ("num", "nan"):
            value = nan if name == "nan" else ~nan
        else:
            value = COMPARE[name[:2]](a, b)
            value = value | nan if name.endswith("u") and len(name) == 3 else value & ~nan if a.dtype.kind == "f" else value
        for joined in {"and", "or", "xor"} & {*code[2:]}:
            value = ARITHMETIC[joined](value, self.get(operands[3], "pred"))
        if kind in PACKED:
            for i, to in enumerate(operands[0].split("|")):
                self.put(to, value[i::2], lanes)
        else:
            self.put(operands[0], value, lanes)

    def do_selp(self, code, operands, lanes) -> None:
        self.put(operands[0], np.where(self.registers[operands[3]], *(self.get(o, code[-1]) for o in operands[1:3])), lanes)

    def do_cvt(self, code, operands, lanes) -> None:
        to, of = code[-2:]
        if to in ("f16x2", "bf16x2"):
            upper, lower = (self.get(o, "f32") for o in operands[1:])
            pair = np.stack(np.broadcast_arrays(lower, upper), 1)
            return self.put(operands[0], (brain(pair) if to == "bf16x2" else pair.astype(np.float16)).view(np.uint32)[:, 0], lanes)
        value = self.get(operands[1], of)
        if to == "bf16":
            return self.put(operands[0], brain(value), lanes)
        dtype = np.dtype(TYPES[to])
        if value.dtype.kind == "f" and code[1] in WHOLE:
            value = WHOLE[code[1]](value)
        if dtype.kind in "iu" and value.dtype.kind == "f":
            limits = np.iinfo(dtype)
            value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max)
        self.put(operands[0], value.astype(dtype), lanes)

    def do_mov(self, code, operands, lanes) -> None:
        to, of = operands
        wide = int(code[-1].strip("bufs")) // 8 if code[-1] != "pred" else 0
        if to[0] == "{":
            parts = names(to)
            halves = np.broadcast_to(self.get(of, code[-1]), self.count).copy().view(RAW[wide // len(parts)]).reshape(-1, len(parts))
            for i, name in enumerate(parts):
                if name != "_":
                    self.put(name, halves[:, i], lanes)
        elif of[0] == "{":
            parts = [np.broadcast_to(self.get(n, f"b{8 * wide // len(names(of))}"), self.count) for n in names(of)]
            self.put(to, np.stack(parts, 1).view(RAW[wide])[:, 0], lanes)
        else:
            self.put(to, self.get(of, code[-1]), lanes)
            self.touched.discard(to)  # a copy of the compiler's, which the assembler gives one register

    def do_prmt(self, code, operands, lanes) -> None:
        a, b, selector = (np.broadcast_to(self.get(o, "u32"), self.count) for o in operands[1:])
        pool = np.stack([a, b], 1).copy().view(np.uint8)
        nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        chosen = np.take_along_axis(pool, (nibbles & 7).astype(np.int64), 1)
        chosen = np.where(nibbles & 8, np.where(chosen & 0x80, 0xFF, 0), chosen).astype(np.uint8)
        self.put(operands[0], chosen.view(np.uint32)[:, 0], lanes)


def run(ptx: str, values: list, grid, threads: int, shared: int, together: int = 32) -> None:
    """A launch: values as the kernel takes them, tensors too, whose memory it changes; `together` blocks at a time."""
    memory = Memory([v for v in values if isinstance(v, torch.Tensor)])
    code, labels = instructions(ptx)
    grid = (*grid, 1, 1)[:3]
    kinds = re.findall(r"\.param \.(\w+)[^,\n]* (\w+)", ptx[:ptx.index("{", ptx.index(".entry"))])
    values = [memory.address(v) if isinstance(v, torch.Tensor) else v for v in values] + [0] * (len(kinds) - len(values))
    given = {name: np.array([value], f"i{int(kind[1:]) // 8}" if type(value) is int and value < 0 else TYPES[kind])
             for (kind, name), value in zip(kinds, values, strict=True)}
    for first in range(0, int(np.prod(grid)), together):
        blocks = np.arange(first, min(first + together, int(np.prod(grid))))
        with np.errstate(all="ignore"):
            Machine(code, labels, given, memory, blocks, grid, threads, shared).run()
    memory.back()
