"""Launch configurations in kernels/configs compile for the card that they were measured on, without spills."""
import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from kernel_checks import INTERPRETED, SHARED, compile_launch, record

from vitprune.cases import BATCHES, HEADS, KEEPS, Size

FOLDER = Path(__file__).parents[1] / "kernels/configs"


def short_attention(dtype, config, B, H, N, D):
    qkv, ends = torch.empty(B, N, 3 * H * D, dtype=dtype), torch.empty(B + 1, dtype=torch.int32)
    return [("short_attention", lambda kernel: [kernel.launch(qkv, H, None, N, 0.125, config),
                                                kernel.launch(qkv.flatten(0, 1), H, ends, N, 0.125, config)])]


def short_attention_backward(dtype, config, B, H, N, D):
    qkv, dout, ends = (torch.empty(B, N, 3 * H * D, dtype=dtype), torch.empty(B, N, H * D, dtype=dtype),
                       torch.empty(B + 1, dtype=torch.int32))
    return [("short_attention_backward", lambda kernel: [
        kernel.launch(dout, qkv, H, None, N, 0.125, config),
        kernel.launch(dout.flatten(0, 1), qkv.flatten(0, 1), H, ends, N, 0.125, config)])]


def policy_attention(dtype, config, B, H, N, D):
    q, m = torch.empty(B, N, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4)[0], torch.empty(B, H, N)
    policy = torch.empty(B, N, dtype=dtype)
    return [("policy_attention", lambda kernel: [kernel.launch(q, q, q, policy, 0.125, eps, config) for eps in (1e-6, 0.0)]),
            ("policy_attention_backward", lambda kernel: [kernel.launch(q, q, q, q, policy, q, m, m, 0.125, eps, config)
                                                          for eps in (1e-6, 0.0)])]


def score_tokens(dtype, config, B, N, C):
    shapes = (B, N, C), (C,), (C, C), (C // 2, C), (C // 4, C // 2), (2, C // 4)
    x, w, w1, w2, w3, w4 = (torch.empty(*shape, dtype=dtype) for shape in shapes)
    return [("score_tokens", lambda kernel: [kernel.launch(x, w, w, 1e-5, w1, w, w2, w[::2], w3, w[::4], w4, w[:2], mask, config)
                                             for mask in (None, torch.empty(B, N, dtype=torch.bool))])]


def sliced_mlp(dtype, config, M, C, L):
    x, w, live = torch.empty(1, M, C, dtype=dtype), torch.empty(4 * C, C, dtype=dtype), torch.empty(L // 64, dtype=torch.int32)
    return [("sliced_mlp", lambda kernel: [kernel.launch(x, w, w[:, 0], w.t(), w[0], live, residual, 64, config)
                                           for residual in (x, None)]),
            ("sliced_mlp", lambda kernel: kernel.launch_backward(x, x, w, w[:, 0], w.t(), live, 64, True, True, config))]


def sliced_linear(dtype, config, M, C, L):
    x, few, live = (torch.empty(1, M, C, dtype=dtype), torch.empty(1, M, L, dtype=dtype), torch.empty(L // 64, dtype=torch.int32))
    to, of = torch.empty(4 * C, C, dtype=dtype), torch.empty(C, 4 * C, dtype=dtype)
    return [("sliced_linear", lambda kernel: [kernel.launch(x, to, to[:, 0], live, "out", 64, config),
                                              kernel.launch(few, of, of[:, 0], live, "in", 64, config)]),
            ("sliced_linear", lambda kernel: [kernel.launch_backward(few, x, to, live, "out", 64, True, True, config),
                                              kernel.launch_backward(x, few, of, live, "in", 64, True, True, config)])]


def shipped() -> list:
    """(architecture, operator, dtype, shape, configuration), one of each kernel; the first of an operator is quick."""
    found, operators = {}, set()
    for path in sorted(FOLDER.glob("*.json")):
        data = json.loads(path.read_text())
        major, minor = data["machine"]["capability"]
        for op, kinds in data["configs"].items():
            for kind, rows in kinds.items():
                for row in rows:
                    width = row["shape"].get("C", row["shape"].get("N"))  # what a kernel is compiled for
                    width = f"{width}-{row['shape']['M'] >= row['config']['large_rows']}" if "M" in row["shape"] else width
                    key = 10 * major + minor, op, kind, width, json.dumps(row["config"])
                    found.setdefault(key, pytest.param(*key[:3], row["shape"], row["config"], id="-".join(map(str, key[:4])),
                                                       marks=[pytest.mark.long] if op in operators else []))
                    operators.add(op)
    return [*found.values()]


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch, op, kind, shape, config", shipped())
def test_compiles(arch, op, kind, shape, config, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import configs, sliced_product, sliced_product_large
    monkeypatch.setattr(configs, "capability", lambda device: arch)
    with torch.device("meta"):
        calls = globals()[op](getattr(torch, kind), config, **shape)
        for module, call in calls:
            kernel = importlib.import_module(f"vitprune.kernels.{module}")
            monkeypatch.setattr(kernel, "processors", lambda index: 132, raising=False)
            modules = (sliced_product, sliced_product_large) if "sliced" in module else kernel
            for launch in record(monkeypatch, modules, lambda: call(kernel)):  # noqa: B023
                built = compile_launch(*launch, arch)
                assert built["spills"] == 0 and built["shared"] <= SHARED[arch]
                multiplies = "attention" in op or op == "score_tokens" or launch[0].__name__ in ("product_kernel", "descriptor_kernel")
                assert arch < 80 or not multiplies or "mma" in built["ptx"]


def measured(op):
    """The shapes of DeiT for which something was measured on that card, as `configs.nearest` is asked for them."""
    for H, B, keep in itertools.product(HEADS.values(), BATCHES, KEEPS):
        s, blocks = Size(B, H, keep), H if op == "sliced_linear" else 4 * H
        if op.startswith("short_attention"):
            yield {"B": B, "H": H, "N": s.kept, "D": 64}
        elif op == "policy_attention":
            yield {"B": B, "H": H, "N": s.tokens, "D": 64}
        elif op == "score_tokens":
            yield {"B": B, "N": s.kept - 1, "C": 64 * H}
        elif B in (1, 8, 32, 128) or B == 1024 and H == 12:
            yield {"M": B * s.tokens, "C": 64 * H, "L": 64 * max(1, round(blocks * (1.0, 0.5, 0.25)[KEEPS.index(keep) % 3]))}


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["short_attention", "short_attention_backward", "policy_attention", "score_tokens", "sliced_mlp",
                                "sliced_linear"])
def test_every_measured_shape_has_a_near_row(op, kind, monkeypatch, recwarn):
    pytest.importorskip("triton")
    from vitprune.kernels import configs
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(configs, "_said", set())
    configs.use(90, json.loads((FOLDER / "nvidia-h200.json").read_text())["configs"])
    found = [configs.nearest(op, 90, getattr(torch, kind), tuple(shape.items())) for shape in measured(op)]
    configs._nearest.cache_clear()
    assert all(found)
    assert not [w for w in recwarn if "no launch configuration is tuned" in str(w.message)]
