"""sliced_linear, as the projections of attention, beside PyTorch's calls: `python -m bench.sliced_linear [DEVICE]` prints JSON."""
import torch

from bench.common import main
from bench.sliced_mlp import heads, rows_of


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    yield from rows_of(heads, device, min_time, brief)


if __name__ == "__main__":
    main(rows)
