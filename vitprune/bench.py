"""Dense against pruned, side by side: interleaved rounds in one process, medians with their spread."""
import copy
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .blocks import BlockPruning, tokens_per_block
from .doctor import choose_device
from .engine import ENGINES, Engine, Unavailable, build
from .measure import count, image_size
from .ops.dispatch import cpu
from .progress import Progress
from .surgery import compact, prune
from .tokens import TokenPruning

ROUNDS = 5
REPEATS = 2  # calls of each kind in a round on the GPU alone
CYCLES = 3e9  # a second, no card runs faster
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILED = ("compiled", "compiled:max-autotune", "compiled:reduce-overhead")


def prepare(name: str, tokens: float | Sequence[float | int] | None = None, schedule: str = "geometric",
            heads: float | Sequence[float] | None = None, hidden: float | Sequence[float] | None = None,
            score: str = "predictor", method: str = "magnitude", at: Sequence[int] = (3, 6, 9)) -> tuple[nn.Module, nn.Module | None]:
    """(dense, pruned) in evaluation mode with random weights: a timm model and its pruned form, compacted where heads or
    hidden units go; pruned is None where nothing is to be pruned. Raises ValueError for a name timm does not have."""
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:4]
        raise ValueError(f"model must be the name of a timm model, got {name!r}" + (f" (there is {', '.join(near)}, ...)" if near else ""))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = timm.create_model(name).eval()
        pruning = {}
        if tokens is not None:
            pruning["tokens"] = TokenPruning(tokens, at=tuple(at), schedule=schedule, score=score)
        if heads is not None or hidden is not None:
            pruning["blocks"] = BlockPruning(1.0 if heads is None else heads, 1.0 if hidden is None else hidden, method=method)
        pruned = prune(dense, **pruning).eval() if pruning else None
        return dense, compact(pruned).eval() if "blocks" in pruning else pruned


def check_removed(model: nn.Module) -> list[int]:
    """Tokens that every block of a pruned model really sees, by running one image; raises RuntimeError where that is not
    what its keep counts say."""
    if not hasattr(model, "keep_counts"):
        return []
    seen: list[int] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for b in model.blocks]
    p = next(model.parameters())
    try:
        with torch.inference_mode():
            model(torch.randn(1, *image_size(model), device=p.device, dtype=p.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    if seen != tokens_per_block(model):
        raise RuntimeError(f"bench: blocks see {seen} tokens, the keep counts {model.keep_counts} say {tokens_per_block(model)}")
    return seen


def interleave(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS, min_time: float = 0.2,
               synchronise: Callable[[], None] = lambda: None, tick: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Milliseconds a call, one mean a round, for each of `calls`: A B C, A B C, ... after warm-up.

    A round of one call lasts at least `min_time` seconds. Raises ValueError for fewer than five rounds.
    """
    if rounds < ROUNDS:
        raise ValueError(f"interleave: rounds must be >= {ROUNDS}, got {rounds}")

    def measure(call: Callable[[], object], n: int) -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(n):
            call()
        synchronise()
        return (time.perf_counter() - start) / n

    repeats = {}
    for name, call in calls.items():
        measure(call, 2)
        repeats[name] = max(1, math.ceil(min_time / max(measure(call, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(1e3 * measure(call, repeats[name]))
        tick()
    return times


def gpu_times(calls: dict, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each of `calls` on the GPU alone, as in a CUDA graph; interleaved: A B C, A B C, ...

    In a round each waits behind a kernel that sleeps until the host has launched all its calls (one that waits for the device is timed with
    its wait), and what the cache holds is overwritten before each launch.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.cuda.device(device):
        spoil = torch.empty(max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 26), dtype=torch.uint8, device=device)
        launching = {}
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            launching[name] = time.perf_counter() - start
        for _ in range(ROUNDS):
            for name, call in calls.items():
                events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
                torch.cuda._sleep(int(CYCLES * min(0.5, 1e-3 + 1.5 * REPEATS * launching[name])))
                for before, after in events:
                    spoil.zero_()
                    before.record()
                    call()
                    after.record()
                torch.cuda.synchronize()
                found[name] += [before.elapsed_time(after) for before, after in events]
    return {name: statistics.median(times) for name, times in found.items()}


def compare(dense: nn.Module, pruned: nn.Module, batch: int = 1, device: str = "cpu", dtype: str = "float32",
            engines: Sequence[str] = ("eager",), rounds: int = ROUNDS, min_time: float = 0.2) -> dict:
    """The row of the first engine that `rows` gives: dense_ms, pruned_ms, speedup, flops_ratio, realised_gain, ..."""
    ratio = count(dense).macs / count(pruned).macs
    found, refused = rows(dense, pruned, ratio, batch, device, dtype, engines, rounds, min_time)
    if not found:
        raise Unavailable("; ".join(r["reason"] for r in refused))
    return found[0]


def rows(dense: nn.Module, pruned: nn.Module, flops_ratio: float, batch: int, device: str, dtype: str, engines: Sequence[str],
         rounds: int = ROUNDS, min_time: float = 0.2, tick: Callable[[], None] = lambda: None) -> tuple[list[dict], list[dict]]:
    """(rows, refusals) for one batch size and dtype: a row an engine of the dense model, all timed in the same rounds.

    The pruned model runs plainly ("eager") and in each engine that the dense model is given, so that like meets like.
    """
    kind, refused = DTYPES[dtype], []
    sides = {side: copy.deepcopy(model).to(device, kind) for side, model in (("dense", dense), ("pruned", pruned))}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *image_size(dense), generator=generator).to(device, kind)
    torch._dynamo.reset()  # models that were compiled before do not count against the limit of recompilations
    running: dict[tuple[str, str], Engine] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the token predictors are untrained")  # time does not depend on the choice
        for name in dict.fromkeys(("eager", *engines)):
            for side, model in sides.items():
                try:
                    engine = build(name, model, images)
                    engine(images)
                    running[side, name] = engine
                except Unavailable as e:
                    refused.append({"engine": name, "side": side, "batch": batch, "dtype": dtype, "reason": str(e)})
                except Exception as e:  # a compiler or exporter that fails here is a reason, not the end of the table
                    refused.append({"engine": name, "side": side, "batch": batch, "dtype": dtype,
                                    "reason": f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"})
        calls = {f"{side} {name}": lambda e=engine: e(images) for (side, name), engine in running.items()}
        synchronise = torch.cuda.synchronize if images.is_cuda else lambda: None
        times = interleave(calls, rounds, min_time, synchronise, tick)
    median = {key: statistics.median(times[f"{key[0]} {key[1]}"]) for key in running}
    spread = {key: [round(f(times[f"{key[0]} {key[1]}"]), 4) for f in (min, max)] for key in running}
    asked = [name for name in engines if ("dense", name) in running]
    fastest = min(asked, key=lambda name: median["dense", name], default=None)
    out = []
    for name in asked:
        other = name if ("pruned", name) in running else "eager"
        d, p = median["dense", name], median["pruned", other]
        best = median["dense", fastest]
        out.append({"batch": batch, "dtype": dtype, "device": device, "baseline": name, "fastest": name == fastest,
                    "pruned_engine": other, "dense_ms": round(d, 4), "dense_range_ms": spread["dense", name],
                    "pruned_ms": round(p, 4), "pruned_range_ms": spread["pruned", other], "speedup": round(d / p, 4),
                    "flops_ratio": round(flops_ratio, 4), "realised_gain": round(d / p / flops_ratio, 4),
                    "fastest_baseline": fastest, "speedup_vs_fastest": round(best / p, 4),
                    "gain_vs_fastest": round(best / p / flops_ratio, 4), "rounds": rounds})
    return out, refused


def bench(model: str, tokens: float | Sequence[float | int] | None = None, schedule: str = "geometric",
          heads: float | Sequence[float] | None = None, hidden: float | Sequence[float] | None = None, device: str = "cpu",
          dtypes: Sequence[str] = ("float32",), batches: Sequence[int] = (1, 8), baselines: Sequence[str] = ("eager",),
          rounds: int = ROUNDS, min_time: float = 0.2, score: str = "predictor", method: str = "magnitude",
          at: Sequence[int] = (3, 6, 9)) -> dict:
    """What `vitprune bench` prints: the machine, the models and a row a batch size, dtype and dense engine."""
    if tokens is None and heads is None and hidden is None:
        raise ValueError("bench: tokens, heads or hidden must be given, got none: there is nothing to compare")
    for value, known, what in ((dtypes, DTYPES, "dtype"), (baselines, ENGINES, "baseline")):
        unknown = [v for v in value if v not in known]
        if unknown:
            raise ValueError(f"bench: {what} must be one of {', '.join(known)}, got {unknown[0]!r}")
    if any(b < 1 for b in batches):
        raise ValueError(f"bench: batch must be >= 1, got {min(batches)}")
    if torch.device(choose_device(device, "bench")).type == "cuda":
        baselines = list(dict.fromkeys((*(m for b in baselines for m in (COMPILED if b == "compiled" else (b,))), "cuda_graph",
                                        *(["modules:cuda_graph"] if "modules" in baselines else []))))
    dense, pruned = prepare(model, tokens, schedule, heads, hidden, score, method, at)
    before, after = count(dense), count(pruned)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the token predictors are untrained")
        seen = check_removed(pruned)
    result = {"model": model, "tokens": tokens, "schedule": schedule if tokens is not None else None, "heads": heads, "hidden": hidden,
              "tokens_per_block": seen, "params": {"dense": before.params, "pruned": after.params},
              "macs": {"dense": before.macs, "pruned": after.macs, "convention": "fvcore; 1 MAC = 2 FLOPs"},
              "machine": machine(device), "rows": [], "unavailable": []}
    with Progress(len(batches) * len(dtypes) * rounds) as progress:
        for dtype in dtypes:
            for batch in batches:
                found, refused = rows(dense, pruned, before.macs / after.macs, batch, device, dtype, baselines, rounds, min_time,
                                      progress.advance)
                result["rows"] += found
                result["unavailable"] += refused
    return result


def machine(device: str = "cpu") -> dict:
    """The machine and the libraries that figures belong to; what cannot be read is left out."""
    from importlib.metadata import version

    import timm

    facts = {"platform": platform.platform(), "cpu": cpu("model name") or platform.processor(), "cpu_mhz": cpu("cpu MHz"),
             "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
             "torch": torch.__version__, "timm": timm.__version__, "vitprune": version("vitprune"),
             "cpu_capability": torch.backends.cpu.get_cpu_capability(),
             "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}
    for package in ("triton", "onnxruntime", "openvino"):
        try:
            facts[package] = version(package)
        except ModuleNotFoundError:
            facts[package] = None
    if torch.device(device).type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "capability": list(torch.cuda.get_device_capability(device)),
                  "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        for name, read, unit in (("gpu_clock_mhz", torch.cuda.clock_rate, 1), ("gpu_watts", torch.cuda.power_draw, 1000)):  # milliwatts
            try:
                facts[name] = read(device) / unit
            except Exception:  # needs nvidia-ml-py and a driver that answers
                facts[name] = None
    return {k: v for k, v in facts.items() if v is not None}


def show(result: dict) -> str:
    """The result of `bench` as plain text."""
    m, lines = result["machine"], []
    what = ", ".join(f"{k} {result[k]}" for k in ("tokens", "schedule", "heads", "hidden") if result[k] is not None)
    lines.append(f"{result['model']}: {what}")
    for name in ("params", "macs"):
        d, p = result[name]["dense"], result[name]["pruned"]
        lines.append(f"{name}: {d:,} dense, {p:,} pruned" + (f" (MACs, {result[name]['convention']})" if name == "macs" else ""))
    lines.append(f"{m.get('gpu', m.get('cpu'))}, {m['threads']} threads, torch {m['torch']}, timm {m['timm']}, vitprune {m['vitprune']}")
    lines.append(f"{'dtype':9}{'batch':>6}  {'dense engine':26}{'dense ms':>10}  {'pruned engine':26}{'pruned ms':>10}"
                 f"{'speed-up':>10}{'MAC ratio':>10}{'realised':>9}{'vs fastest':>11}")
    for r in result["rows"]:
        lines.append(f"{r['dtype']:9}{r['batch']:>6}  {r['baseline'] + (' *' if r['fastest'] else ''):26}{r['dense_ms']:>10.2f}  "
                     f"{r['pruned_engine']:26}{r['pruned_ms']:>10.2f}{r['speedup']:>10.3f}{r['flops_ratio']:>10.3f}"
                     f"{r['realised_gain']:>9.3f}{r['speedup_vs_fastest']:>11.3f}")
    lines.append("* the fastest dense engine; medians of interleaved rounds; realised = speed-up / MAC ratio")
    lines += [f"{u['engine']} ({u['side']}, {u['dtype']}, batch {u['batch']}): {u['reason']}" for u in result["unavailable"]]
    return "\n".join(lines)
