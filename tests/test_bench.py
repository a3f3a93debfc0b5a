"""Engines, interleaving and the rows of a comparison."""
import contextlib
import copy
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import vitprune
from vitprune import BlockPruning, TokenPruning, bench, engine
from vitprune.engine import Unavailable, accelerate, build


class Sleeper(nn.Module):
    """Takes a known time a call."""
    pretrained_cfg = {"input_size": (3, 8, 8)}

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds, self.fc = seconds, nn.Linear(192, 2)

    def forward(self, x):
        time.sleep(self.seconds)
        return self.fc(x.flatten(1))


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    dense = timm.create_model("test_vit").eval()
    pruned = vitprune.prune(dense, tokens=TokenPruning(0.7, at=(2, 3, 4), score="cls_attention"), blocks=BlockPruning(0.5, 0.5))
    return dense, vitprune.compact(pruned).eval()


def test_rounds_are_interleaved():
    log = []
    times = bench.interleave({"a": lambda: log.append("a"), "b": lambda: (log.append("b"), time.sleep(0.002))}, rounds=6, min_time=0.0)
    assert "".join(log[-12:]) == "ab" * 6
    assert [len(t) for t in times.values()] == [6, 6]
    assert min(times["b"]) >= 2.0
    with pytest.raises(ValueError, match="rounds must be >= 5, got 4"):
        bench.interleave({}, rounds=4)


def test_rows_against_known_times():
    rows, refused = bench.rows(Sleeper(0.03), Sleeper(0.01), 2.0, 1, "cpu", "float32", ["eager", "cuda_graph"], min_time=0.0)
    assert [r["engine"] for r in refused] == ["cuda_graph", "cuda_graph"]
    assert "need a GPU" in refused[0]["reason"]
    row, = rows
    assert 30 <= row["dense_ms"] < 60
    assert 10 <= row["pruned_ms"] < 25
    assert row["speedup"] == pytest.approx(row["dense_ms"] / row["pruned_ms"], rel=1e-3)
    assert row["realised_gain"] == pytest.approx(row["speedup"] / 2.0, abs=1e-3)
    assert row["dense_range_ms"][0] <= row["dense_ms"] <= row["dense_range_ms"][1]
    assert row["fastest"]
    assert row["pruned_engine"] == "eager"


def test_bench_report(pair):
    result = bench.bench("test_vit", tokens=0.7, heads=0.5, hidden=0.5, at=(2, 3, 4), batches=(1, 2), dtypes=("float32", "bfloat16"),
                         baselines=("eager",), min_time=0.0)
    assert [(r["dtype"], r["batch"]) for r in result["rows"]] == [("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)]
    assert result["tokens_per_block"] == [101, 101, 71, 49, 35, 35]
    assert {"torch", "timm", "vitprune", "threads", "python"} <= result["machine"].keys()
    ratio = result["macs"]["dense"] / result["macs"]["pruned"]
    assert all(r["flops_ratio"] == pytest.approx(ratio, abs=1e-4) for r in result["rows"])
    assert "realised" in bench.show(result)


@pytest.mark.parametrize(("options", "message"), [
    ({}, "tokens, heads or hidden must be given"),
    ({"tokens": 0.7, "baselines": ["fast"]}, "baseline must be one of .* got 'fast'"),
    ({"tokens": 0.7, "dtypes": ["int8"]}, "dtype must be one of .* got 'int8'"),
    ({"tokens": 0.7, "batches": [0]}, "batch must be >= 1, got 0"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        bench.bench("deit_tiny_patch16_224", **options)


def test_unknown_model():
    with pytest.raises(ValueError, match="must be the name of a timm model, got 'deit_tiny'"):
        bench.prepare("deit_tiny", tokens=0.7)


def test_tokens_that_do_not_leave_are_an_error(pair, monkeypatch):
    assert bench.check_removed(pair[1])[-1] < 101
    monkeypatch.setattr(vitprune.PrunedViT, "_prune_tokens", lambda self, state, *_: state)
    with pytest.raises(RuntimeError, match="blocks see"):
        bench.check_removed(pair[1])


@pytest.mark.parametrize(("name", "side"), [("modules", 0), ("modules", 1), ("packed", 0), ("packed", 1), ("compiled", 1),
                                             ("onnxruntime", 0), ("onnxruntime", 1), ("openvino", 0), ("openvino", 1)])
def test_engines_agree_with_plain_evaluation(pair, name, side):
    if name not in ("modules", "packed", "compiled"):
        pytest.importorskip(name)
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    expected = build("eager", pair[side], images)(images)
    got = build(name, pair[side], images)(images)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


def test_missing_package_is_named(pair, monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(Unavailable, match=rf"{name} is not installed \(pip install 'vitprune\[export\]'\)"):
            build(name, pair[0], torch.randn(1, 3, 160, 160))


def test_an_engine_that_fails_is_a_reason(pair, monkeypatch):
    def fail(model, images):
        raise OSError("no compiler\nand more")

    monkeypatch.setitem(engine.ENGINES, "compiled", fail)
    rows, refused = bench.rows(*pair, 2.0, 1, "cpu", "float32", ["eager", "compiled"], min_time=0.0)
    assert [r["baseline"] for r in rows] == ["eager"]
    assert [r["reason"] for r in refused] == ["OSError: no compiler"] * 2


def test_pruned_falls_back_to_plain_evaluation_and_says_so(pair, monkeypatch):
    def dense_only(model, images):
        if isinstance(model, vitprune.PrunedViT):
            raise Unavailable("not this one")
        return build("eager", model, images)

    monkeypatch.setitem(engine.ENGINES, "openvino", dense_only)
    rows, refused = bench.rows(*pair, 2.0, 1, "cpu", "float32", ["openvino"], min_time=0.0)
    assert (rows[0]["baseline"], rows[0]["pruned_engine"]) == ("openvino", "eager")
    assert (refused[0]["side"], refused[0]["reason"]) == ("pruned", "not this one")


def test_export_takes_any_batch(pair, tmp_path):
    pytest.importorskip("onnxruntime")
    path = engine.export_onnx(pair[1], tmp_path / "m.onnx", torch.randn(1, 3, 160, 160))
    for batch in (1, 3):
        assert engine.check_onnx(path, pair[1], torch.randn(batch, 3, 160, 160)) < 1e-5
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        engine.export_onnx(copy.deepcopy(pair[1]).train(), tmp_path / "n.onnx", torch.randn(1, 3, 160, 160))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_accelerate(pair, dtype, tolerance, monkeypatch):
    if dtype == torch.bfloat16:  # rounded scores may keep other tokens
        pair = pair[0], vitprune.compact(vitprune.prune(pair[0], blocks=BlockPruning(0.5, 0.5))).eval()
    monkeypatch.setitem(engine.ENGINES, "compiled", lambda model, images: build("eager", model, images))
    images = torch.randn(2, 3, 160, 160)
    fast = accelerate(pair[1], batch_size=2, dtype=dtype)
    assert fast.engine in ("eager", "packed", "openvino", "compiled")
    with torch.inference_mode():
        expected = pair[1](images)
    got = fast(images).float()
    assert float((got - expected).abs().max() / expected.abs().max()) < tolerance
    assert next(pair[1].parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\] = \(2, 3, 160, 160\), got \(1, 3, 160, 160\)"):
        fast(images[:1])
    with pytest.raises(RuntimeError, match="cannot train"):
        fast.train()
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        accelerate(pair[1], 0)


@pytest.mark.parametrize("error", [RuntimeError("no compiler"), AssertionError(), torch.OutOfMemoryError("out of memory")])
def test_accelerate_survives_engines_that_fail(pair, monkeypatch, error):
    def fail(model, images):
        raise error

    for name in ("packed", "openvino", "compiled"):
        monkeypatch.setitem(engine.ENGINES, name, fail)
    with pytest.warns(UserWarning, match="does not work here") as said:
        assert accelerate(pair[1], 1).engine == "eager"
    assert [str(w.message).partition(" (")[0] for w in said if "accelerate" in str(w.message)] == [
        f"accelerate: {name} does not work here" for name in ("packed", "openvino", "compiled")]
    monkeypatch.setitem(engine.ENGINES, "eager", fail)
    with pytest.raises(type(error)):
        accelerate(pair[1], 1)


def test_packed_weights_are_a_copy_of_their_own(pair):
    """The model can change afterwards; a batch of another size than that packed for is served too."""
    model = copy.deepcopy(pair[1])
    run = build("packed", model, torch.randn(2, 3, 160, 160))
    assert not any("packed" in layer.__dict__ for layer in model.modules())
    images = torch.randn(3, 3, 160, 160)
    expected = build("eager", pair[1], images)(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert float((run(images) - expected).abs().max() / expected.abs().max()) < 1e-5
    with pytest.raises(Unavailable, match="oneDNN does not serve torch.float64"):
        build("packed", copy.deepcopy(model).double(), images.double())


def test_models_of_the_caller_are_untouched(pair):
    before = [m.state_dict()["head.weight"].clone() for m in pair]
    assert bench.compare(*pair, batch=1, dtype="bfloat16", min_time=0.0)["dtype"] == "bfloat16"
    assert all(torch.equal(m.state_dict()["head.weight"], b) for m, b in zip(pair, before))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(("name", "side"), [("cuda_graph", 1), ("modules:cuda_graph", 0)])
def test_cuda_graph(pair, name, side):
    images = torch.randn(4, 3, 160, 160, device="cuda")
    model = copy.deepcopy(pair[side]).cuda()
    run = build(name, model, images)
    with torch.inference_mode():
        for x in (images, torch.randn_like(images)):
            torch.testing.assert_close(run(x), model(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("side", [0, 1])
def test_accelerate_on_a_card(pair, side):
    images = torch.randn(4, 3, 160, 160)
    model = copy.deepcopy(pair[side]).cuda()
    fast = accelerate(model, 4, torch.float16)
    assert fast.engine in ("cuda_graph", "modules:cuda_graph")[:2 - side]
    with torch.inference_mode():
        expected = model(images.cuda())
    assert float((fast(images).float() - expected).abs().max() / expected.abs().max()) < 0.05


class Card:
    """A GPU that runs what it is given in order, a clock of its own; stands in for torch.cuda."""

    def __init__(self):
        self.host, self.queued, self.free = 0.0, [], 0.0

    def work(self, host: float, gpu: float) -> None:
        self.host += host
        self.free = max(self.free, self.host) + gpu

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(record=lambda: setattr(event, "at", max(self.free, self.host)))
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def synchronize(self) -> None:
        self.host = self.free = max(self.host, self.free)


def test_time_on_the_gpu_alone_is_without_the_host(monkeypatch):
    gpu = Card()
    cuda = SimpleNamespace(device=lambda device: contextlib.nullcontext(), synchronize=gpu.synchronize, Event=gpu.event,
                           _sleep=lambda cycles: gpu.work(0.0, cycles / bench.CYCLES),
                           get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1 << 20))
    spoil = SimpleNamespace(zero_=lambda: gpu.work(1e-6, 1e-5))
    monkeypatch.setattr(bench, "torch", SimpleNamespace(cuda=cuda, uint8=None, empty=lambda *_, **__: spoil))
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: gpu.host))
    calls = {"launches": lambda: gpu.work(1e-4, 2e-6), "works": lambda: gpu.work(1e-6, 5e-3)}
    assert bench.gpu_times(calls, None) == pytest.approx({"launches": 0.002, "works": 5.0})
