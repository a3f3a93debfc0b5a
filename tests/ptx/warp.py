"""The instructions of warps: exchanges, sums, and products of matrices."""
import re

import numpy as np

from .arithmetic import bits
from .memory import SEVERAL, WARP, Fault, Shared, names, spread


class Warps(Shared):
    """Their instructions; `Machine` brings registers."""

    def prepare(self, blocks: int, size: int) -> None:
        super().prepare(blocks, size)
        self.products, self.batches = [], np.zeros(self.count, np.int32)  # of wgmma: what runs, and how many groups were committed
        self.pending: dict = {}  # registers that products are to write: the lanes
        self.touched: set = set()  # registers written since the last wgmma.fence

    def whole(self, mask) -> np.ndarray:
        """Which warps take part, [warps]; all of their threads must."""
        if mask is None:
            return np.ones(self.count // WARP, bool)
        each = mask.reshape(-1, WARP)
        if (each.any(1) != each.all(1)).any():
            raise Fault("an instruction of a warp that some of its threads miss")
        return each[:, 0]

    def do_shfl(self, code, operands, mask) -> None:
        self.whole(mask)
        of, by = self.get(operands[1], "u32").reshape(-1, WARP), np.broadcast_to(self.get(operands[2], "u32"), self.count).reshape(-1, WARP)
        clamp, lane = int(operands[3], 0), np.arange(WARP)
        if clamp != (0 if code[2] == "up" else 31) or operands[4] not in ("-1", "0xffffffff") or "|" in operands[0]:
            raise Fault("only whole warps, without a predicate, are known")
        source = {"bfly": lambda: lane ^ by & 31, "idx": lambda: by & 31, "up": lambda: lane - by.astype(int),
                  "down": lambda: lane + by.astype(int)}[code[2]]()
        source = np.where((source < 0) | (source > 31), lane, source).astype(int)
        self.put(operands[0], np.take_along_axis(of, source, 1).reshape(-1), mask)

    def do_redux(self, code, operands, mask) -> None:
        self.whole(mask)
        members = np.broadcast_to(self.get(operands[2], "u32"), self.count).reshape(-1, WARP)
        if (members != 0xFFFFFFFF).any():
            raise Fault("only whole warps are known")
        value = np.broadcast_to(self.get(operands[1], code[-1]), self.count).reshape(-1, WARP)
        of = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or}[code[2]]
        self.put(operands[0], np.repeat(of.reduce(value, 1, dtype=value.dtype), WARP), mask)

    def _rows(self, operand: str, number: int, mask) -> tuple[np.ndarray, np.ndarray]:
        """Where the 8 rows of so many matrices are, which as many lanes name: ([warps, number * 8], their lanes)."""
        lanes = np.flatnonzero(np.repeat(self.whole(mask), WARP) & (np.arange(self.count) % WARP < 8 * number))
        return self.locate(operand, "shared", 16, lanes), lanes

    def do_ldmatrix(self, code, operands, mask) -> None:
        number = int(code[4][1:])
        at, lanes = self._rows(operands[1], number, mask)
        matrices = self.fetch(at, "shared", 16, lanes).view(np.uint16).reshape(-1, number, 8, 8)
        if "trans" in code:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, number, WARP)
        for i, name in enumerate(names(operands[0])):
            value = np.zeros((self.count // WARP, WARP), np.uint32)
            value[self.whole(mask)] = words[:, i]
            self.put(name, value.reshape(-1), mask)

    def do_stmatrix(self, code, operands, mask) -> None:
        number = int(code[4][1:])
        at, lanes = self._rows(operands[0], number, mask)
        words = np.stack([self.get(n, "u32").reshape(-1, WARP)[self.whole(mask)] for n in names(operands[1])], 1)
        matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, number, 8, 8)
        if "trans" in code:
            matrices = matrices.swapaxes(2, 3)
        self.store(at, "shared", np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8), lanes)

    def do_mma(self, code, operands, mask) -> None:
        shape, kind = code[3], code[7]
        if shape not in ("m16n8k16", "m16n8k8") or code[4:6] != ["row", "col"] or code[-1] != "f32":
            raise Fault("unknown product")
        self.whole(mask)

        def halves(of: str) -> np.ndarray:
            """[warps, registers, 8, 4, 2]: of groups, their threads, a thread's pair."""
            return np.stack([self.get(n, kind + "x2").astype(np.float32).reshape(-1, 8, 4, 2) for n in names(of)], 1)
        a, b = halves(operands[1]), halves(operands[2])
        deep = b.shape[1]  # of eight each
        left = a.reshape(-1, deep, 2, 8, 8).transpose(0, 2, 3, 1, 4).reshape(-1, 16, 8 * deep)
        right = b.reshape(-1, deep, 8, 8).transpose(0, 1, 3, 2).reshape(-1, 8 * deep, 8)
        product = (left @ right).reshape(-1, 2, 8, 4, 2)
        for i, (to, of) in enumerate(zip(names(operands[0]), names(operands[3]))):
            self.put(to, product[:, i // 2, :, :, i % 2].reshape(-1) + self.get(of, "f32"), mask)

    def do_wgmma(self, code, operands, mask) -> None:
        """Products of four warps. A card reads and writes at any time up to the wait: until then nobody may touch either."""
        lanes = np.ones(self.count, bool) if mask is None else mask
        if code[1] == "fence":
            return self.touched.clear()
        if code[1] == "commit_group":
            self.batches[lanes] += 1
            return None
        if code[1] == "wait_group":
            return self._finish(lanes, int(operands[0]))
        kind, columns = code[6], int(re.fullmatch(r"m64n(\d+)k16", code[4])[1])
        groups = self.whole(mask).reshape(-1, 4)
        if (groups.any(1) != groups.all(1)).any() or code[5] != "f32":
            raise Fault("unknown product")
        groups, (more, left_sign, right_sign, *turned) = groups[:, 0], operands[3:]
        if (left_sign, right_sign) != ("1", "1"):
            raise Fault("negated factors are unknown")
        results, factors = names(operands[0]), names(operands[1]) if operands[1][0] == "{" else []
        if self.touched & {*results, *factors}:
            raise Fault("registers of a product were written without a fence")
        right, read = self._tile(operands[2], columns, turned[-1] == "1", kind, groups)
        if factors:
            a = np.stack([self.get(n, kind + "x2").astype(np.float32).reshape(-1, 4, 8, 4, 2) for n in factors], 2)
            left = a.reshape(-1, 4, 2, 2, 8, 8).transpose(0, 1, 3, 4, 2, 5).reshape(-1, 64, 16)[groups]
        else:
            left, also = self._tile(operands[1], 64, turned[0] == "1", kind, groups)
            read = np.union1d(read, also)
        product = np.zeros((len(groups), 4, 2, 8, columns // 8, 4, 2), np.float32)
        product[groups] = (left @ right.swapaxes(1, 2)).reshape(-1, 4, 2, 8, columns // 8, 4, 2)
        again = np.broadcast_to(self.get(more, "pred"), self.count)
        for i, name in enumerate(results):
            part = product[:, :, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1)
            self.put(name, part + np.where(again, self.held(name).view(np.float32), np.float32(0)), mask)
        self.touched -= {*results}
        self.busy[read] += 1
        self.products.append((results, lanes.copy(), read, self.batches.copy()))
        self._mark()

    def _finish(self, lanes: np.ndarray, left: int) -> None:
        """Products of all but the last `left` groups are there."""
        running = []
        for results, of, read, group in self.products:
            over = of & lanes & (group <= self.batches - 1 - left)
            blocks = np.zeros(len(self.epoch), bool)
            blocks[self.block[over]] = True
            gone = blocks[read // self.size]
            self.busy[read[gone]] -= 1
            if (of & ~over).any():
                running.append((results, of & ~over, read[~gone], group))
        self.products = running
        self._mark()

    def _mark(self) -> None:
        """Which lanes may not read which registers."""
        self.pending.clear()
        for results, of, _, _ in self.products:
            for name in results:
                self.pending[name] = self.pending.get(name, False) | of

    def _tile(self, descriptor: str, rows: int, turned: bool, kind: str, groups: np.ndarray) -> tuple:
        """The operand [groups, rows, 16] that a matrix descriptor names, in float32, and where its bytes are; turned: its rows, not its
        depth, are contiguous."""
        lanes = np.arange(0, self.count, 4 * WARP)[groups]
        word = np.broadcast_to(self.get(descriptor, "u64"), self.count)[lanes].astype(np.int64)
        start, leading, stride = (((word >> at & 0x3FFF) << 4)[:, None, None] for at in (0, 16, 32))
        modes = set((word >> 62 & 3).tolist())
        if modes not in ({1}, {2}, {3}) or (word >> 49 & 7).any():
            raise Fault(f"layouts {modes} of a matrix are unknown")
        swizzle = {1: 128, 2: 64, 3: 32}[modes.pop()]
        row, depth = np.arange(rows)[:, None], np.arange(16)[None, :]
        if turned:
            at = start + row % (swizzle // 2) * 2 + row // (swizzle // 2) * leading + depth % 8 * swizzle + depth // 8 * stride
        else:
            at = start + depth * 2 + row % 8 * swizzle + row // 8 * stride
        at = at ^ (at >> 3 & {128: 0x70, 64: 0x30, 32: 0x10}[swizzle])
        if (at < 0).any() or (at + 2 > self.size).any():
            raise Fault(f"outside of {self.size} bytes of shared memory")
        each, at = np.repeat(lanes, rows * 16), (at + (self.block[lanes] * self.size)[:, None, None]).reshape(-1)
        data = self.fetch(at, "shared", 2, each, np.full(len(each), SEVERAL, np.int16)).view(np.uint16).reshape(-1, rows, 16)
        read = np.unique(spread(at, 2))
        if self.fresh[read].any():
            raise Fault("a product reads what was written without fence.proxy.async")
        return bits(data) if kind == "bf16" else data.view(np.float16).astype(np.float32), read
