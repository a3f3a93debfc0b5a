"""What threads of `ptx.Machine` share: memory, with its races."""
import numpy as np
import torch

BASE = 1 << 40  # where global memory starts
WARP = 32
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SEVERAL = -2  # warps


class Fault(Exception):
    """The program did what a card may not do, or something unknown here."""


class Memory:
    """Tensors' storages side by side, with room between that nobody may touch."""

    def __init__(self, tensors):
        self.storages, end = {}, 256
        for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}.values():
            self.storages[storage.data_ptr()] = (storage, end)
            end += -(-storage.nbytes() // 256) * 256 + 256
        self.bytes, self.valid = np.zeros(end, np.uint8), np.zeros(end, bool)
        for storage, at in self.storages.values():
            self.bytes[at:at + storage.nbytes()] = self._view(storage)
            self.valid[at:at + storage.nbytes()] = True

    @staticmethod
    def _view(storage) -> np.ndarray:
        return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()

    def address(self, t: torch.Tensor) -> int:
        return BASE + (self.storages[t.untyped_storage().data_ptr()][1] if t.numel() else 0) + t.storage_offset() * t.element_size()

    def back(self) -> None:
        for storage, at in self.storages.values():
            self._view(storage)[:] = self.bytes[at:at + storage.nbytes()]


def names(braced: str) -> list[str]:
    """Of registers in braces; or the one that stands alone."""
    return [n.strip() for n in braced.strip("{} ").split(",")]


def spread(at: np.ndarray, width: int) -> np.ndarray:
    """The bytes of accesses of that width, [accesses, width]."""
    return at[:, None] + np.arange(width)


class Shared:
    """Instructions that reach beyond a thread; `Machine` brings registers."""

    def prepare(self, blocks: int, size: int) -> None:
        self.size, whole = size, blocks * size
        self.shared = np.full(whole, 0xFF, np.uint8)  # NaN in every format
        self.epoch = np.zeros(blocks, np.int32)  # barriers passed
        self.written, self.writer = np.full(whole, -1, np.int32), np.zeros(whole, np.int16)
        self.read, self.reader = np.full(whole, -1, np.int32), np.zeros(whole, np.int16)
        self.flying = np.zeros(whole, bool)  # what an asynchronous copy is to bring
        self.busy = np.zeros(whole, np.int16)  # how many products of wgmma are to read it
        self.fresh = np.zeros(whole, bool)  # written since its writer's last fence.proxy.async, so that wgmma may miss it
        self.copies, self.committed = [], np.zeros(self.count, np.int32)

    # --- addresses ---------------------------------------------------------------------------------------------------

    def lanes(self, mask) -> np.ndarray:
        return np.arange(self.count) if mask is None else np.flatnonzero(mask)

    def locate(self, operand: str, space: str, width: int, lanes: np.ndarray) -> np.ndarray:
        """Where [operand] points to, in `memory.bytes` or `shared`."""
        name, _, offset = operand.strip("[] ").partition("+")
        address = np.broadcast_to(self.get(name.strip(), "s32" if space == "shared" else "s64"), self.count)[lanes].astype(np.int64)
        address = address + int(offset or 0) - (BASE if space == "global" else 0)
        if (address % width).any():
            raise Fault(f"misaligned, {space} memory: {width} bytes at {address[address % width != 0][0]}")
        if space == "shared":
            if (address < 0).any() or (address + width > self.size).any():
                raise Fault(f"outside of {self.size} bytes of shared memory: {address.min()} to {address.max() + width}")
            return self.block[lanes] * self.size + address
        inside = (address >= 0) & (address + width <= len(self.memory.bytes))
        inside[inside] = self.memory.valid[address[inside]] & self.memory.valid[address[inside] + width - 1]
        if not inside.all():
            raise Fault(f"outside of every tensor: thread {lanes[~inside][0]}")
        return address

    def fetch(self, at: np.ndarray, space: str, width: int, lanes: np.ndarray, warp: np.ndarray | None = None) -> np.ndarray:
        """Bytes [accesses, width]; warp: who reads, where it is not the lanes' own."""
        found = spread(at, width)
        if space == "global":
            return self.memory.bytes[found]
        epoch, warp = self.epoch[self.block[lanes]][:, None], (self.warp[lanes] if warp is None else warp)[:, None]
        if self.flying[found].any():
            raise Fault("an asynchronous copy is read before it was waited for")
        if ((self.written[found] == epoch) & (self.writer[found] != warp)).any():
            raise Fault("race: read in the same epoch as another warp writes")
        more = (self.read[found] == epoch) & (self.reader[found] != warp)
        epoch, warp = np.broadcast_to(epoch, found.shape), np.broadcast_to(warp, found.shape)
        self.read[found] = epoch
        self.reader[found] = np.where(more, SEVERAL, warp)
        self.reader[found[(self.reader[found] != warp)]] = SEVERAL
        return self.shared[found]

    def store(self, at: np.ndarray, space: str, data: np.ndarray, lanes: np.ndarray, lands: bool = False) -> None:
        """data: bytes [accesses, width]."""
        found, memory = spread(at, data.shape[1]), self.memory.bytes if space == "global" else self.shared
        if space == "shared":
            self.claim(found, lanes, None if lands else data, lands)
            self.fresh[found] = True
        memory[found] = data
        if (memory[found] != data).any():
            raise Fault("threads write unequal values to one address")

    def claim(self, found: np.ndarray, lanes: np.ndarray, data: np.ndarray | None, lands: bool = False) -> None:
        """That warps write these bytes; data None: asynchronously, from now until it lands."""
        epoch = np.broadcast_to(self.epoch[self.block[lanes]][:, None], found.shape)
        warp = np.broadcast_to(self.warp[lanes][:, None], found.shape)
        if self.flying[found].any() and not lands:
            raise Fault("written while an asynchronous copy is to land there")
        if self.busy[found].any():
            raise Fault("written while a product is to read it")
        if ((self.read[found] == epoch) & (self.reader[found] != warp)).any():
            raise Fault("race: written in the same epoch as another warp reads")
        unequal = True if data is None else self.shared[found] != data
        if ((self.written[found] == epoch) & (self.writer[found] != warp) & unequal).any():
            raise Fault("race: written by two warps in the same epoch")
        self.written[found], self.writer[found] = epoch, warp

    # --- loads, stores, copies ---------------------------------------------------------------------------------------

    @staticmethod
    def _shape(code) -> tuple[str, int, int]:
        """(space, values, bytes of each)"""
        vector = next((int(p[1:]) for p in code if p in ("v2", "v4", "v8")), 1)
        return code[1].partition("::")[0], vector, int(code[-1][1:]) // 8

    def do_ld(self, code, operands, mask) -> None:
        if code[1] == "param":
            return self.put(operands[0], self.values[operands[1].strip("[] ")], mask)
        space, vector, width = self._shape(code)
        lanes = self.lanes(mask)
        data = self.fetch(self.locate(operands[1], space, width * vector, lanes), space, width * vector, lanes)
        data = np.ascontiguousarray(data).view(RAW[width])
        data = data.view(f"i{width}") if code[-1][0] == "s" else data
        for i, name in enumerate(names(operands[0])):
            value = np.zeros(self.count, data.dtype)
            value[lanes] = data[:, i]
            self.put(name, value, mask)

    def do_st(self, code, operands, mask) -> None:
        space, vector, width = self._shape(code)
        lanes = self.lanes(mask)
        data = np.stack([np.broadcast_to(self.get(n, f"b{width * 8}"), self.count)[lanes] for n in names(operands[1])], 1)
        at = self.locate(operands[0], space, width * vector, lanes)
        self.store(at, space, np.ascontiguousarray(data).view(np.uint8).reshape(len(lanes), -1), lanes)

    def do_cp(self, code, operands, mask) -> None:
        lanes = self.lanes(mask)
        if "commit_group" in code:
            self.committed[lanes] += 1
        elif "wait_group" in code or "wait_all" in code:
            due = np.full(self.count, -1)
            due[lanes] = self.committed[lanes] - 1 - int(operands[0] if operands else -1)
            self.copies = [rest for copy in self.copies if len((rest := self._land(*copy, due))[0])]
        else:
            if code[2:] != ["ca", "shared", "global"] and code[2:] != ["cg", "shared", "global"]:
                raise Fault("unknown copy")
            width, filled = int(operands[2], 0), self.get(operands[3], "u32") if len(operands) > 3 else np.array([int(operands[2], 0)])
            filled = np.broadcast_to(filled, self.count)[lanes]
            to, data = self.locate(operands[0], "shared", width, lanes), np.zeros((len(lanes), width), np.uint8)
            some = filled > 0
            data[some] = self.fetch(self.locate(operands[1], "global", width, lanes[some]), "global", width, lanes[some])
            data[np.arange(width) >= filled[:, None]] = 0
            self.claim(spread(to, width), lanes, None)
            self.flying[spread(to, width)] = True
            self.copies.append((lanes, to, data, self.committed[lanes].copy()))

    def _land(self, lanes, to, data, group, due) -> tuple:
        """What copies of groups up to `due` bring; returns the rest."""
        now = group <= due[lanes]
        self.flying[spread(to[now], data.shape[1])] = False
        self.store(to[now], "shared", data[now], lanes[now], lands=True)
        return lanes[~now], to[~now], data[~now], group[~now]

    def do_bar(self, code, operands, mask) -> None:
        if "warp" in code:
            return
        if operands != ["0"]:
            raise Fault("only barrier 0, for all threads, is known")
        arrived = np.bincount(self.block[self.lanes(mask)], minlength=len(self.epoch))
        if ((arrived != 0) & (arrived != self.threads)).any():
            raise Fault("a barrier that some threads of a block miss")
        self.epoch += arrived > 0

    def do_fence(self, code, operands, mask) -> None:
        if code[:3] != ["fence", "proxy", "async"]:
            raise Fault("unknown")
        warps = np.zeros((len(self.epoch), self.threads // WARP), bool)
        lanes = self.lanes(mask)
        warps[self.block[lanes], self.warp[lanes]] = True
        own = np.take_along_axis(warps, self.writer.reshape(len(self.epoch), -1).astype(np.int64), 1)
        seen = warps.any(1)[:, None] & (self.written.reshape(own.shape) < self.epoch[:, None])  # through a barrier
        self.fresh &= ~(own | seen).reshape(-1)

    def do_prefetch(self, code, operands, mask) -> None:
        """Nothing to do here."""
