"""Operators and whole models on one card, in at most ten minutes: `python -m bench.card [DEVICE]` writes bench/results/card-NAME.json.

Every bench runs in a process of its own, gets its share of the time that is left (a model two), and is stopped at its end: rows that were
finished count, and the file says what was cut. `python -m bench.collect FILE` checks such a file and puts it into the tables.
"""
import argparse
import contextlib
import datetime
import importlib
import inspect
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.model import MODELS, PRUNING
from vitprune import bench, nvrtc
from vitprune.doctor import choose_device
from vitprune.ops import dispatch, registry

HERE = Path(__file__).parent
BUDGET = 570.0  # seconds; starting and stopping take the rest of ten minutes
FORMAT = 1


def jobs() -> list[str]:
    """Models first: they are what counts. Then what operators take of them, and every operator that has a file here."""
    return [*MODELS, "train_step", "shares", *(op for op in sorted(registry.TABLES) if (HERE / f"{op}.py").is_file())]


def kind_of(job: str) -> str:
    """What its rows are."""
    return "model" if job in MODELS else "shares" if job == "shares" else "operator"


def work(job: str, device: str):
    """The rows of one job."""
    if job in MODELS:
        gpu = torch.device(device).type == "cuda"
        options = {"dtypes": ["float16"], "batches": (1, 32, 128), "min_time": 0.05} if gpu else {"dtypes": ["float32"], "batches": (1,)}
        for pruning in PRUNING:
            yield bench.bench(job, **pruning, device=device, baselines=["eager", "modules"], **options)
        if gpu:  # compiling takes longer than the rest: where there is time
            for pruning in reversed(PRUNING):
                yield bench.bench(job, **pruning, device=device, baselines=["eager", "compiled:reduce-overhead"],
                                  **options | {"batches": (1, 128)})
        return
    rows = importlib.import_module(f"bench.{job}").rows
    options = {"min_time": 0.02, "brief": True}
    yield from rows(torch.device(device), **{k: v for k, v in options.items() if k in inspect.signature(rows).parameters})


def run(name: str, command: list[str], seconds: float, clocks=lambda: {}) -> dict:
    """What one process printed, a JSON object a line, in that time at most; with clocks sampled while it ran."""
    start, samples, cut = time.monotonic(), [], None
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=HERE.parent, start_new_session=True)
        try:
            while process.poll() is None:
                left = start + seconds - time.monotonic()
                if left <= 0:
                    cut = f"stopped after {seconds:.0f} s"
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(2.0, left))
                    continue
                samples.append(clocks())
        finally:
            if process.poll() is None:
                _kill(process)
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().splitlines())
    rows, said = [], [line for line in texts[1] if line.strip()]
    for line in texts[0]:
        with contextlib.suppress(ValueError):  # the last line of a process that was stopped
            rows.append(json.loads(line))
    failed = process.returncode != 0 and cut is None
    return {"name": name, "kind": kind_of(name), "seconds": round(time.monotonic() - start, 1), "cut": cut,
            "error": _cause(said, process.returncode) if failed else None, "clocks": _spread(samples), "rows": rows}


def _cause(said: list[str], status: int) -> str:
    """The line that names the exception; a CUDA error's text goes on below it."""
    named = [line for line in said if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Unavailable|NonFiniteLoss)\b", line)]
    return (named or said or [f"status {status}"])[-1]


def _kill(process: subprocess.Popen) -> None:
    """The process and those it started (compilers)."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _spread(samples: list[dict]) -> dict:
    """{name: [least, median, most]}"""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.items():
            found.setdefault(name, []).append(value)
    return {name: [min(values), statistics.median(values), max(values)] for name, values in found.items()}


def clocks(device: str) -> dict:
    """What the device runs at now; what cannot be read is left out."""
    if torch.device(device).type != "cuda":
        mhz = dispatch.cpu("cpu MHz")
        return {"cpu_mhz": float(mhz)} if mhz else {}
    fields = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits",
             f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"]
    found = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        values = subprocess.run(query, capture_output=True, text=True, check=True, timeout=5).stdout.split(",")
        for name, value in zip(fields.values(), values):
            with contextlib.suppress(ValueError):
                found[name] = float(value)
    return found


def card(device: str, budget: float, names: list[str], out: Path | None = None) -> Path:
    """Run the jobs and write the file after each of them; returns its path."""
    start = time.monotonic()
    name = dispatch.card(torch.device(device)) or "unknown"
    out = out or HERE / "results" / f"card-{dispatch.slug(name)}.json"
    data = {"format": FORMAT, "name": name, "device": torch.device(device).type, "machine": bench.machine(device), "budget": budget,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "idle_clocks": clocks(device), "jobs": []}
    for i, job in enumerate(names):
        weights = [2 if name in MODELS else 1 for name in names[i:]]
        share = (start + budget - time.monotonic()) * weights[0] / sum(weights)
        print(f"{job}: at most {share:.0f} s", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "bench.card", device, "--job", job]
        done = run(job, command, max(share, 0.0), lambda: clocks(device))
        data["jobs"].append(done)
        if done["cut"] or done["error"]:
            print(f"{job}: {done['cut'] or done['error']}, {len(done['rows'])} rows", file=sys.stderr, flush=True)
        data["seconds"] = round(time.monotonic() - start, 1)
        nvrtc.write(out, (json.dumps(data, indent=1) + "\n").encode())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--only", nargs="+", choices=jobs(), default=jobs(), help="operators and models to run")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--job", choices=jobs(), help=argparse.SUPPRESS)  # in the process of one job
    options = parser.parse_args()
    try:
        choose_device(options.device, "bench.card")
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    options.budget > 0 or parser.error(f"budget must be > 0 seconds, got {options.budget}")
    if options.job:
        for row in work(options.job, options.device):
            print(json.dumps(row), flush=True)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
        if options.device == "cpu" and not torch.cuda.is_available():
            print("no GPU is usable here (`vitprune doctor` says why): the CPU is measured", flush=True)
        print(card(options.device, options.budget, options.only, options.out))


if __name__ == "__main__":
    main()
