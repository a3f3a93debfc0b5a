"""What the files bench/OP.py share: each has `rows(device, min_time, brief)`, a generator, and `python -m bench.OP [DEVICE]` prints JSON.

brief: a few shapes and dtypes, those that matter most first, for bench/card.py, which may stop a bench at any row.
"""
import json
import statistics
import sys
from collections.abc import Callable, Iterator

import torch

from vitprune.bench import DTYPES, interleave, machine
from vitprune.ops import backend

LIMITS = {"H200": (4.8e12, 989e12)}  # bytes a second and FLOPs a second in 16 bits, from the data sheet


def kinds(device: torch.device, brief: bool) -> list[str]:
    """Names of the dtypes to time."""
    if device.type != "cuda":
        return ["float32", "bfloat16"]
    if brief:  # below compute capability 8.0 bfloat16 is emulated
        return ["bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"]
    return list(DTYPES)


def times(calls: dict, device: torch.device, min_time: float) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(median, [least, most]) milliseconds of each of `calls`, interleaved."""
    found = interleave(calls, min_time=min_time, synchronise=torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    return {n: statistics.median(t) for n, t in found.items()}, {n: [min(t), max(t)] for n, t in found.items()}


def forced(name: str, function: Callable, **options) -> Callable:
    """function with the backend of that name; the choice is made here, outside of what torch.compile sees."""
    def run(*args, **more):
        with backend(name):
            return function(*args, **options, **more)
    return run


def limit(device: torch.device) -> tuple[float, float] | None:
    """The card's entry of LIMITS."""
    return next((v for k, v in LIMITS.items() if device.type == "cuda" and k in torch.cuda.get_device_name(device)), None)


def main(rows: Callable[[torch.device], Iterator[dict]]) -> None:
    """Print the machine and all rows as one JSON document; those before an error too, which then is raised."""
    where = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu")
    result = {"machine": machine(str(where)), "device": str(where), "rows": []}
    try:
        result["rows"] += rows(where)
    finally:
        print(json.dumps(result, indent=2))
