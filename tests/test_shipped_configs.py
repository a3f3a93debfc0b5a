"""Launch configurations in kernels/configs compile for the card that they were measured on, without spills."""
import importlib
import json
from pathlib import Path

import pytest
import torch
from kernel_checks import INTERPRETED, SHARED, compile_launch, record

FOLDER = Path(__file__).parents[1] / "kernels/configs"


def short_attention(dtype, config, B, H, N, D):
    qkv = torch.empty(B, N, 3 * H * D, dtype=dtype)
    return [("short_attention", lambda kernel: kernel.launch(qkv, H, None, N, 0.125, config))]


def policy_attention(dtype, config, B, H, N, D):
    q, m = torch.empty(B, N, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4)[0], torch.empty(B, H, N)
    policy = torch.empty(B, N, dtype=dtype)
    return [("policy_attention", lambda kernel: kernel.launch(q, q, q, policy, 0.125, 1e-6, config)),
            ("policy_attention_backward", lambda kernel: kernel.launch(q, q, q, q, policy, q, m, m, 0.125, 1e-6, config))]


def shipped() -> list:
    """(architecture, operator, dtype, shape, configuration), one of each kernel; the first of an operator is quick."""
    found, operators = {}, set()
    for path in sorted(FOLDER.glob("*.json")):
        data = json.loads(path.read_text())
        major, minor = data["machine"]["capability"]
        for op, kinds in data["configs"].items():
            for kind, rows in kinds.items():
                for row in rows:
                    key = 10 * major + minor, op, kind, row["shape"]["N"], json.dumps(row["config"])
                    found.setdefault(key, pytest.param(*key[:3], row["shape"], row["config"], id="-".join(map(str, key[:4])),
                                                       marks=[pytest.mark.long] if op in operators else []))
                    operators.add(op)
    return [*found.values()]


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch, op, kind, shape, config", shipped())
def test_compiles(arch, op, kind, shape, config, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import configs
    monkeypatch.setattr(configs, "capability", lambda device: arch)
    with torch.device("meta"):
        calls = globals()[op](getattr(torch, kind), config, **shape)
        for module, call in calls:
            kernel = importlib.import_module(f"vitprune.kernels.{module}")
            monkeypatch.setattr(kernel, "processors", lambda index: 132, raising=False)
            for launch in record(monkeypatch, kernel, lambda: call(kernel)):  # noqa: B023
                built = compile_launch(*launch, arch)
                assert built["spills"] == 0 and built["shared"] <= SHARED[arch]
                assert arch < 80 or "mma" in built["ptx"]
