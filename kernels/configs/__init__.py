"""Tuned launch configurations: sm90.json would hold those of compute capability 9.0, a card's dispatch file holds its own; kernels launch
by `default` elsewhere.

{operator: {dtype: [{"shape": {name: int}, "config": {name: int}}]}}; a shape that is not listed takes the nearest that is and fits it
(`_holds`); where that is far, it is said once for each operator. `default` serves where none fits.
What was tuned on this very card goes before it (`use`). Here lie the dispatch files of measured cards (vitprune/ops/dispatch.py).
"""
import contextlib
import functools
import importlib.util
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).parent
FAR = 2.0  # doublings of sizes beyond which the nearest configuration may be a bad one
COUNTS = ("spans", "programs", "stages", "tiles")  # ends of names; tiles and warps are powers of two
TILES = {"queries": (16, 256), "keys": (16, 256), "warps": (1, 32)}  # ends of names: the least and the most that kernels work with
_tuned: dict[int, dict] = {}   # by compute capability, a table as in the files
_said: set[str] = set()        # operators for which the nearest configuration served
_probe: dict[tuple, dict | None] | None = None  # not by thread: a gradient runs in another


@functools.cache
def capability(device: torch.device) -> int:
    """90 for compute capability 9.0; a CPU, which can only interpret, counts as 80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def table(arch: int) -> dict:
    """All configurations of that compute capability, {} where none was measured."""
    path = FOLDER / f"sm{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def use(arch: int, tuned: dict) -> None:
    """Take the configurations of `tuned` before the shipped ones on cards of that compute capability."""
    _tuned[arch] = tuned
    _nearest.cache_clear()


def kernel(op: str) -> ModuleType | None:
    """The file of what asks for configurations by that name: its own, or its operator's; None where there is none."""
    from ...ops import registry
    triton = registry.TABLES.get(op, {}).get("triton")
    files = {path.stem for path in FOLDER.parent.glob("*.py")}
    stem = next((s for s in (op, triton and triton.run.__module__.rpartition(".")[2]) if s in files), None)
    return stem and importlib.import_module(f"{__package__.rpartition('.')[0]}.{stem}")


def check(tuned: dict) -> None:
    """Raises ValueError where that is no table of configurations with which kernels can be launched."""
    for op, kinds in tuned.items():
        try:
            wrong = next((row for kind, rows in kinds.items() for row in rows if not _fits(op, getattr(torch, kind), **row)), None)
        except (AttributeError, KeyError, TypeError):
            wrong = kinds
        if wrong is not None:
            raise ValueError(f"configs of {op} must be {{dtype: [{{shape, config}}]}} with sizes > 0 and all that its kernel takes, "
                             f"powers of two where it is no count, got {wrong!r:.100}")


def _fits(op: str, dtype: torch.dtype, shape: dict, config: dict) -> bool:
    """Whether that kernel can be launched so."""
    if not (shape and config) or any(type(size) is not int for size in (*shape.values(), *config.values())) or min(shape.values()) < 1:
        return False
    if importlib.util.find_spec("triton") is None:  # nothing is launched, and what it would take is not known
        return True
    file = kernel(op)

    def fits(name: str, size: int) -> bool:
        if name == "keys" and size == 0 and hasattr(file, "keys_of"):  # all in one pass
            return True
        least, most = next((TILES[end] for end in TILES if name.endswith(end)), (1, math.inf))
        return least <= size <= most and (name.endswith(COUNTS) or not size & size - 1)
    return config.keys() == file.default(dtype, 80, **shape).keys() and all(fits(name, size) for name, size in config.items())


@contextlib.contextmanager
def probing(given: dict[tuple, dict | None]) -> Iterator[dict[tuple, dict | None]]:
    """Inside, launches take the configuration `given` for their (op, arch, dtype, shape), and their default where there is none;
    what they ask for is added to `given`. For `vitprune tune`, one call at a time."""
    global _probe
    previous, _probe = _probe, given
    try:
        yield given
    finally:
        _probe = previous


def nearest(op: str, arch: int, dtype: torch.dtype, shape: tuple[tuple[str, int], ...]) -> dict | None:
    """The configuration tuned for the shape closest to `shape`, sizes compared as ratios, among those that held as much on chip; None
    where none was tuned."""
    if _probe is not None:
        return _probe.setdefault((op, arch, dtype, shape))
    return _nearest(op, arch, dtype, shape)


def _holds(row: dict, shape: dict) -> bool:
    """Whether tiles that were tuned for that row's shape are as good as known for `shape`: for heads of another width they were not chosen;
    of the channels of a norm, and of the keys of one pass, which a program holds whole, more would be spilled, or find no room."""
    was = {**shape, **row["shape"]}
    wider = "R" in shape and (shape.get("C", 1) - 1).bit_length() > (was.get("C", 1) - 1).bit_length()  # held as a power of two
    longer = row["config"].get("keys") == 0 and -(-shape.get("N", 0) // 16) > -(-was.get("N", 0) // 16)
    return shape.get("D") == was.get("D") and not (wider or longer)


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, arch: int, dtype: torch.dtype, shape: tuple[tuple[str, int], ...]) -> dict | None:
    kind = str(dtype).removeprefix("torch.")
    rows = _tuned.get(arch, {}).get(op, {}).get(kind) or table(arch).get(op, {}).get(kind) or []
    rows = [row for row in rows if _holds(row, dict(shape))]

    def distance(row: dict) -> float:
        return sum(abs(math.log2(max(size, 1) / max(row["shape"].get(name, 1), 1))) for name, size in shape)

    if not rows:
        return None
    row = min(rows, key=distance)
    if distance(row) > FAR and op not in _said:
        _said.add(op)
        near, asked = (", ".join(f"{name} {size}" for name, size in sizes) for sizes in (row["shape"].items(), shape))
        warnings.warn(f"{op}: no launch configuration is tuned for {asked}, that of {near} serves; said once", stacklevel=2)
    return dict(row["config"])
