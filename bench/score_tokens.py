"""The token predictor in inference beside its modules: `python -m bench.score_tokens [DEVICE]` prints JSON."""
import torch

from bench.common import forced, kinds, main, share_of_limit, timed
from bench.select_tokens import shapes
from vitprune import cases
from vitprune.bench import DTYPES
from vitprune.cases import calls
from vitprune.ops import registry


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a shape and dtype: milliseconds of every backend and of the modules compiled, bytes that must move, MACs of the split form."""
    for kind in kinds(device, brief):
        for size in shapes(device, brief):
            torch._dynamo.reset()
            function, (x,) = cases.inputs("score_tokens", size, device, DTYPES[kind])
            functions = {name: forced(name, function) for name in registry.TABLES["score_tokens"]}
            functions["compiled_reference"] = forced("reference", torch.compile(function, dynamic=False))
            with torch.inference_mode():
                ready, refused = calls(functions, [x], [], False)
                columns = timed(ready, device, min_time)
            B, N, C = x.shape
            weights = C * C + C * C // 2 + C * C // 8 + C // 2
            row = {"B": B, "N": N, "C": C, "dtype": kind, "bytes": x.element_size() * (x.numel() + B * N + weights),
                   "macs": registry.MACS["score_tokens"](x.shape), **columns, "unavailable": refused}
            yield row | share_of_limit(device, row)


if __name__ == "__main__":
    main(rows)
