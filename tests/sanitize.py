"""Every kernel at sizes on the edges of its tiles, forward and with its gradients, beside float64: what `make sanitize` watches on a GPU.

`python tests/sanitize.py` by itself is a check of all kernels in a minute, on a CPU of those in C++.
"""
import contextlib
import importlib.util
import itertools
import sys
from unittest import mock

import torch

from vitprune import cases
from vitprune.cases import Size
from vitprune.ops import registry
from vitprune.tune import Item, Trial

SIZES = [Size(2, 1, 1.0, tokens=2), Size(1, 2, 0.5, tokens=17), Size(3, 1, 0.3, tokens=66), Size(1, 1, 0.7, tokens=197),
         Size(21, 1, 0.5, tokens=197)]  # rows enough for what serves many


def failures(device: torch.device) -> list[str]:
    """What is off or raises, in words; prints each kernel before it is called, so that a card's last words name it."""
    found = []
    with one_multiprocessor():
        for case, kind, size in itertools.product(cases.CASES, ("float32", "float16", "bfloat16"), SIZES):
            trial = Trial(Item(case, kind, size, False), device)
            for name in [n for n in trial.usable if not registry.find(trial.item.op, n).composite]:
                print(case, kind, size, name, file=sys.stderr, flush=True)
                if reason := trial.fails(name):
                    found.append(f"{case} in {name}, {kind}: {reason}")
    return found


def one_multiprocessor():
    """Programs of short_attention ask early for the rows of later ones: here of the next but one, where there are few."""
    if importlib.util.find_spec("triton") is None:
        return contextlib.nullcontext()
    from vitprune.kernels import short_attention
    return mock.patch.object(short_attention, "processors", return_value=1)


if __name__ == "__main__":
    sys.exit("\n".join(failures(torch.device("cuda" if torch.cuda.is_available() else "cpu"))) or 0)
