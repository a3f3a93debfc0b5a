"""What every Triton kernel takes of each architecture at its default configuration.

`python tests/resources.py` compiles all, without a GPU, in a few minutes, and writes bench/results/resources.json; `python -m bench.render`
puts the table into bench/README.md."""
import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import triton
from kernel_checks import ARCHS, compile_launch, record
from launches import CALLS

sys.path.append(str(Path(__file__).parents[1]))
from bench import render  # noqa: E402


def resources(batch: int) -> dict[str, dict[str, list[int]]]:
    """{kernel: {architecture: [registers, bytes spilled, bytes of shared memory]}}, the most of its launches."""
    found: dict[str, dict[str, list[int]]] = {}
    for (call, names), arch in itertools.product(CALLS, ARCHS):
        modules = tuple(importlib.import_module(f"vitprune.kernels.{name}") for name in names)
        with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
            patch.setattr(modules[0].configs, "capability", lambda device: arch)  # noqa: B023
            patch.setattr(modules[0].configs, "nearest", lambda *_: None)
            patch.setattr(modules[0], "processors", lambda index: 132, raising=False)
            launches = record(patch, modules, lambda: call(*modules[:2], batch, 197))  # noqa: B023
        for launch in launches:
            built = compile_launch(*launch, arch)
            row = found.setdefault(f"{launch[0].fn.__module__.rpartition('.')[2]}: {launch[0].fn.__name__}", {})
            took = [built[k] for k in ("registers", "spills", "shared")]
            row[str(arch)] = [max(pair) for pair in zip(took, row.get(str(arch), took))]
    return found


if __name__ == "__main__":
    data = {"triton": triton.__version__, "batch": 128, "kernels": resources(128)}
    (render.RESULTS / "resources.json").write_text(json.dumps(data) + "\n")
