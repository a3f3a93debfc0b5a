"""Tuned launch configurations: sm90.json holds those of compute capability 9.0.

{operator: {dtype: [{"shape": {name: int}, "config": {name: int}}]}}; a shape that is not listed takes the nearest that is.
"""
import functools
import json
import math
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


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


@functools.lru_cache(maxsize=4096)
def nearest(op: str, arch: int, dtype: torch.dtype, shape: tuple[tuple[str, int], ...]) -> dict | None:
    """The configuration tuned for the shape closest to `shape`, sizes compared as ratios; None where none was tuned."""
    rows = table(arch).get(op, {}).get(str(dtype).removeprefix("torch."), [])

    def distance(row: dict) -> float:
        return sum(abs(math.log2(max(size, 1) / max(row["shape"].get(name, 1), 1))) for name, size in shape)

    return dict(min(rows, key=distance)["config"]) if rows else None
