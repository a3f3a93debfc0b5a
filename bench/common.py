"""What the files bench/OP.py share: each has `rows(device, min_time, brief)`, a generator, and `python -m bench.OP [DEVICE]` prints JSON.

brief: a few shapes and dtypes, those that matter most first, for bench/card.py, which may stop a bench at any row.
A row has wall time, "ms"; on a GPU also "gpu_ms", without what the host takes and with a cold cache.
"""
import argparse
import contextlib
import functools
import json
import statistics
from collections.abc import Callable, Iterator

import torch

from vitprune.bench import DTYPES, gpu_times, interleave, machine
from vitprune.doctor import choose_device
from vitprune.ops import backend, registry

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


def timed(calls: dict, device: torch.device, min_time: float, graph: bool = True) -> dict:
    """The columns "ms", "spread_ms" and on a GPU "gpu_ms" of a row; graph: that one with what serves in a CUDA graph, where it is free."""
    ms, spread = times(calls, device, min_time)
    if device.type != "cuda":
        return {"ms": ms, "spread_ms": spread}
    with registry.for_graph() if graph else contextlib.nullcontext():
        return {"ms": ms, "spread_ms": spread, "gpu_ms": gpu_times(calls, device)}


def forced(name: str, function: Callable, **options) -> Callable:
    """function with the backend of that name; the choice is made here, outside of what torch.compile sees."""
    def run(*args, **more):
        with backend(name):
            return function(*args, **options, **more)
    return run


def kernels(op: str, device: torch.device, dtype: torch.dtype, function: Callable, **facts) -> dict:
    """Name -> function with that backend, or its reason to refuse, for every backend of the operator that is not plain PyTorch."""
    return {name: reason or forced(name, function) for name, reason in registry.table(op, device, dtype, **facts).items()
            if not registry.find(op, name).composite}


@functools.cache
def limit(device: torch.device) -> tuple[float, float] | None:
    """Bytes and 16-bit FLOPs a second: the card's entry of LIMITS, else what a large copy and a large product reach; None on a CPU."""
    if device.type != "cuda":
        return None
    if known := next((v for k, v in LIMITS.items() if k in torch.cuda.get_device_name(device)), None):
        return known
    source, target = (torch.empty(1 << 28, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = torch.randn(2, 4096, 4096, device=device).to(DTYPES[kinds(device, True)[0]])
    ms = gpu_times({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device)
    return 2e3 * source.nbytes / ms["copy"], 2e3 * 4096 ** 3 / ms["product"]


def share_of_limit(device: torch.device, row: dict) -> dict:
    """The column of that name: the least time that the row's bytes and MACs take on that card over the time taken."""
    if (most := limit(device)) is None or row["dtype"] == "float32" and row["macs"]:
        return {}
    least = 1e3 * max(row["bytes"] / most[0], 2 * row["macs"] / most[1])
    return {"limit": most, "share_of_limit": {name: least / t for name, t in row["gpu_ms"].items()}}


def share_of_copy(row: dict) -> dict:
    """The column of that name: bytes a second over those of "copy", which moves row["copied"]."""
    ms = row.get("gpu_ms", row["ms"])
    return {"share_of_copy_bandwidth": {name: row["bytes"] / t / (row["copied"] / ms["copy"]) for name, t in ms.items() if name != "copy"}}


def main(rows: Callable[[torch.device], Iterator[dict]]) -> None:
    """Print the machine and all rows as one JSON document; those before an error too, which then is raised."""
    parser = argparse.ArgumentParser(description="Prints the machine and a row a shape as JSON.")
    parser.add_argument("device", nargs="?", help="cpu, cuda or cuda:N; a GPU where there is one")
    try:
        where = torch.device(choose_device(parser.parse_args().device, "bench"))
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    result = {"machine": machine(str(where)), "device": str(where), "rows": []}
    try:
        result["rows"] += rows(where)
    finally:
        print(json.dumps(result, indent=2))
