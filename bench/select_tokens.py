"""select_tokens, every backend that can run here, side by side: `python -m bench.select_tokens [DEVICE]` prints JSON."""
import json
import statistics
import sys

import torch

from vitprune.bench import interleave
from vitprune.ops import backend, registry, select_tokens

SHAPES = [(1, 196, 137, 384), (8, 196, 137, 384), (1, 196, 137, 768), (8, 196, 137, 768), (32, 196, 137, 768)]  # B, N, K, C


def rows(device: torch.device):
    """One row for each shape and dtype: median and spread (ms) of every backend."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for dtype in (torch.float32, torch.bfloat16):
        for B, N, K, C in SHAPES:
            x, scores = torch.randn(B, N + 1, C, device=device).to(dtype), torch.randn(B, N, device=device)
            usable = [n for n, reason in registry.table("select_tokens", device, dtype).items() if reason is None]

            def call(name, x=x, scores=scores, K=K):
                with backend(name):
                    return select_tokens(x, scores, K)
            with torch.inference_mode():
                times = interleave({name: lambda name=name: call(name) for name in usable}, synchronise=synchronise)
            yield {"B": B, "N": N, "K": K, "C": C, "dtype": str(dtype).removeprefix("torch."),
                   "ms": {n: statistics.median(t) for n, t in times.items()},
                   "spread_ms": {n: [min(t), max(t)] for n, t in times.items()}}


if __name__ == "__main__":
    where = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"device": str(where), "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "rows": list(rows(where))}, indent=2))
