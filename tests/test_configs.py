"""Launch configurations: which row of a table serves, what a table may hold, and the shipped files."""
import json

import pytest
import torch
from vitprune.kernels import configs

from vitprune.ops import dispatch

LAUNCHES = {**dict.fromkeys(("compact_tokens", "expand_rows", "select_norm", "select_tokens"), {"B": 128, "N": 197, "C": 384}),
            **dict.fromkeys(("policy_attention", "short_attention", "short_attention_backward"), {"B": 128, "H": 6, "N": 197, "D": 64}),
            **dict.fromkeys(("sliced_linear", "sliced_mlp"), {"M": 197, "C": 384, "L": 192}), "add_norm": {"R": 197, "C": 384}}


@pytest.mark.parametrize(("op", "other", "serves"), [
    ("short_attention", {"B": 4}, True), ("short_attention", {"N": 180}, True), ("short_attention", {"N": 208}, True),
    ("short_attention", {"N": 209}, False), ("short_attention", {"D": 32}, False), ("policy_attention", {"D": 128}, False),
    ("policy_attention", {"N": 577}, True), ("add_norm", {"C": 192}, True), ("add_norm", {"C": 448}, True), ("add_norm", {"C": 513}, False),
    ("sliced_mlp", {"C": 1024}, True)])
def test_what_was_tuned_serves_what_it_is_known_to_fit(op, other, serves, monkeypatch):
    """Tiles that hold whole channels or keys would spill more of them, or ask for more shared memory than there is."""
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(configs, "_said", {op})
    config = configs.kernel(op).default(torch.float16, 90, **LAUNCHES[op]) if op != "short_attention" else \
        configs.kernel(op).default(torch.float16, 90, **LAUNCHES[op]) | {"keys": 0}
    configs.use(90, {op: {"float16": [{"shape": LAUNCHES[op], "config": config}]}})
    found = configs.nearest(op, 90, torch.float16, tuple((LAUNCHES[op] | other).items()))
    assert found == (config if serves else None)


@pytest.mark.parametrize("op", LAUNCHES)
def test_what_is_tuned_can_be_read(op):
    pytest.importorskip("triton")
    for dtype in ("float16", "float32"):
        for arch in (75, 80, 90, 120):
            found = configs.kernel(op).candidates(getattr(torch, dtype), arch, **LAUNCHES[op])
            configs.check({op: {dtype: [{"shape": LAUNCHES[op], "config": config} for config in found]}})


@pytest.mark.parametrize(("op", "shape", "config"), [
    ("short_attention", {}, {"queries": 0}), ("short_attention", {}, {"queries": 17}), ("short_attention", {}, {"queries": True}),
    ("short_attention", {}, {"keys": 512}), ("short_attention", {}, {"queries": 8}), ("short_attention", {}, {"num_warps": 64}),
    ("short_attention", {}, {"spans": 0}), ("short_attention", {}, {"unheard": 1}), ("short_attention", {}, None),
    ("short_attention", {"N": -197}, {}), ("short_attention", {"unheard": 1}, {}), ("short_attention", None, {}),
    ("policy_attention", {}, {"keys": 0}), ("add_norm", {"R": 0}, {}), ("sliced_product", {}, {}), ("configs", {}, {}), ("../x", {}, {}),
])
def test_what_no_kernel_can_be_launched_with_is_refused(op, shape, config):
    pytest.importorskip("triton")
    known = op if op in LAUNCHES else "select_tokens"
    row = {"shape": {} if shape is None else LAUNCHES[known] | shape,
           "config": {} if config is None else configs.kernel(known).default(torch.float16, 80, **LAUNCHES[known]) | config}
    with pytest.raises(ValueError, match=f"configs of {op} must be .* with sizes > 0 and all that its kernel takes"):
        configs.check({op: {"float16": [row]}})


def test_shipped_files_are_valid():
    for path in configs.FOLDER.glob("*.json"):
        data = json.loads(path.read_text())
        if path.stem.startswith("sm"):
            configs.check(data)
        else:
            dispatch.check(data, None)
