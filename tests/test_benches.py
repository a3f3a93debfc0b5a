"""What the files of bench/ time: the same calls, counted, beside what they are compared with."""
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.nn import functional as F

from vitprune.train import TrainConfig

sys.path.append(str(Path(__file__).parents[1]))
from bench import common, policy_attention, select_tokens, shares, short_attention  # noqa: E402


def test_a_bench_that_fails_prints_what_it_had(monkeypatch, capsys):
    def rows(device):
        yield {"ms": 1}
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(sys, "argv", ["bench", "cpu"])
    with pytest.raises(torch.OutOfMemoryError):
        common.main(rows)
    assert json.loads(capsys.readouterr().out)["rows"] == [{"ms": 1}]


def test_what_a_training_call_keeps_is_counted():
    x, policy = torch.randn(2, 197, 3 * 384, requires_grad=True), torch.ones(2, 197, requires_grad=True)
    found = policy_attention.candidates(torch.device("cpu"), torch.float32)
    kept = {name: policy_attention.saved(functools.partial(found[name], H=6), [x, policy]) for name in ("eager", "unmasked sdpa math")}
    scores = 4 * 2 * 6 * 197 * 197
    assert kept["eager"] > 3 * scores and scores < kept["unmasked sdpa math"] < 3 * scores
    if callable(found["cpp"]):
        kernel = policy_attention.saved(functools.partial(found["cpp"], H=6), [x, policy])
        assert kernel == 4 * 2 * 6 * 197 * (64 + 2)  # the output, a maximum and a sum a row


def test_uneven_rows_beside_varlen(monkeypatch):
    """Where PyTorch has no varlen, one sequence after the other stands in for it."""
    def alone(q, k, v, ends, _, *longest):
        assert longest == (max(ends.diff()),) * 2
        parts = zip(*(t.split(ends.diff().tolist()) for t in (q, k, v)))
        return torch.cat([F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in part)).transpose(0, 1) for part in parts])
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=alone))
    ends, x = torch.tensor([0, 3, 4, 9], dtype=torch.int32), torch.randn(9, 3 * 2 * 64)
    torch.testing.assert_close(short_attention.varlen(x, 2, ends, 5), short_attention.ours(x, 2, ends, 5))
    x = torch.randn(2, 5, 3 * 2 * 64)
    torch.testing.assert_close(short_attention.packed(x, 2, short_attention.varlen), short_attention.ours(x, 2))
    row = short_attention.uneven(torch.device("cpu"), "float32", 0.0, B=1, H=2)
    assert {"varlen", "sdpa", "pad, sdpa, unpad"} <= row["ms"].keys()
    assert (row["bytes"], row["macs"]) == (row["longest"] * 4 * 2 * 64 * 4, 2 * 2 * 64 * row["longest"] ** 2)


def test_official_selection_keeps_the_same_tokens():
    x, scores = torch.randn(3, 9, 4), torch.randn(3, 8)
    expected = torch.stack([torch.cat([row[:1], row[1:][s.argsort(descending=True)[:5]]]) for row, s in zip(x, scores)])
    assert torch.equal(select_tokens.argsort(x, scores, 5), expected)


def once(calls, device, min_time):
    for call in calls.values():
        call()
    return dict.fromkeys(calls, 1.0), dict.fromkeys(calls, [1.0, 1.0])


@pytest.mark.parametrize("amp, dtype", [("off", "float32"), ("bfloat16", "bfloat16")])
def test_calls_are_repeated_as_the_trainer_makes_them(monkeypatch, amp, dtype):
    """Under autocast too, which is what a GPU trains with: a call alone must see it as well."""
    monkeypatch.setattr(timm, "create_model", lambda name: timm.models.VisionTransformer(
        patch_size=56, embed_dim=192, depth=10, num_heads=3, num_classes=5))
    monkeypatch.setattr(shares, "TrainConfig", functools.partial(TrainConfig, amp=amp))
    monkeypatch.setattr(shares, "times", once)
    row = shares.shares("small", 2, torch.device("cpu"), training=True)
    assert row["dtype"] == dtype
    assert row["calls"] == {"add_norm": 10, "policy_attention": 7, "short_attention": 3, "sliced_linear": 20,
                            "sliced_mlp": 10}
    assert row["share"] == row["calls"]
    assert shares.shares("small", 2, torch.device("cpu"), training=False)["calls"]["select_norm"] == 3


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    def little(name, batch, device, training):
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch, training
    monkeypatch.setattr(shares, "shares", little)
    assert list(shares.rows(torch.device("cpu"))) == [*2 * [(2, False)], *2 * [(2, True)], *2 * [(1, False)]]
