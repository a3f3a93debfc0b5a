"""layer_norm beside what PyTorch has: `python -m bench.layer_norm [DEVICE]` prints JSON."""
import torch
from torch.nn import functional as F

from bench.add_norm import shapes
from bench.common import kernels, kinds, main, share_of_copy, timed
from vitprune import cases
from vitprune.bench import DTYPES
from vitprune.cases import Size, calls
from vitprune.ops import layer_norm


def candidates(device: torch.device, dtype: torch.dtype) -> dict:
    """Name -> function, or the reason why there is none."""
    found = {"eager": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-6)}
    found["compiled"] = torch.compile(found["eager"], dynamic=False)
    return found | kernels("layer_norm", device, dtype, lambda x, w, b: layer_norm(x, w, b, 1e-6), grad=False)


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a shape and dtype: milliseconds, bytes that must move, and the share of the bandwidth of a copy."""
    for kind in kinds(device, brief):
        functions = candidates(device, DTYPES[kind])
        for B, N, C in shapes(device, brief):
            torch._dynamo.reset()  # one shape's graphs do not count against the next one's
            args = cases.inputs("layer_norm", Size(B, C // 64, tokens=N), device, DTYPES[kind])[1]
            x, target = args[0], torch.empty_like(args[0])
            with torch.inference_mode():
                ready, refused = calls(functions, args, None, False)
                ready["copy"] = lambda x=x, target=target: target.copy_(x)
                row = {"B": B, "N": N, "C": C, "dtype": kind, "pass": "forward", "bytes": 2 * x.nbytes, "macs": 0, "copied": 2 * x.nbytes,
                       **timed(ready, device, min_time), "unavailable": refused}
            yield row | share_of_copy(row)


if __name__ == "__main__":
    main(rows)
