"""select_norm beside a selection and a norm by themselves, and PyTorch's forms: `python -m bench.select_norm [DEVICE]` prints JSON."""
import functools

import torch
from torch.nn import functional as F

from bench.common import forced, kernels, kinds, main, share_of_limit, timed
from bench.select_tokens import argsort, shapes
from vitprune import cases, ops
from vitprune.bench import DTYPES
from vitprune.cases import calls
from vitprune.ops import registry


def apart(select, x, scores, weight, bias):
    tokens = select(x, scores)[0]
    return tokens, ops.layer_norm(tokens, weight, bias, 1e-6)


def sorted_first(x, scores, weight, bias, k: int):
    tokens = argsort(x, scores, k)
    return tokens, F.layer_norm(tokens, x.shape[2:], weight, bias, 1e-6)


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a shape and dtype: milliseconds of the kernel, of every backend of `select_tokens` with the norm after it, of PyTorch's forms,
    and of the norm of the same output alone; bytes that must move."""
    for kind in kinds(device, brief):
        for size in shapes(device, brief):
            torch._dynamo.reset()
            function, args = cases.inputs("select_norm", size, device, DTYPES[kind])
            select, (x, scores, weight, bias) = cases.inputs("select_tokens", size, device, DTYPES[kind])[0], args
            functions = {f"{name} and norm": reason or functools.partial(apart, forced(name, select)) for name, reason in
                         registry.table("select_tokens", device, DTYPES[kind], scores=DTYPES[kind]).items() if name != "reference"}
            functions |= kernels("select_norm", device, DTYPES[kind], function, scores=DTYPES[kind], weight=DTYPES[kind], grad=False)
            functions |= {"reference": forced("reference", function), "argsort, gather": functools.partial(sorted_first, k=size.kept - 1),
                          "compiled_reference": forced("reference", torch.compile(function, dynamic=False))}
            with torch.inference_mode():
                ready, refused = calls(functions, args, [], False)
                kept = function(*args)[0]
                ready["norm alone"] = functools.partial(F.layer_norm, kept, kept.shape[2:], weight, bias, 1e-6)
                row = {"B": size.B, "N": size.tokens - 1, "K": size.kept - 1, "C": x.shape[2], "dtype": kind, "pass": "forward",
                       "bytes": 3 * kept.nbytes + scores.nbytes + 8 * size.B * (size.kept - 1), "macs": 0,
                       **timed(ready, device, min_time), "unavailable": refused}
            yield row | share_of_limit(device, row)


if __name__ == "__main__":
    main(rows)
