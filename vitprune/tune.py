"""`vitprune tune`: the fastest backend and launch configuration of every operator on this card, each checked first.

A file of the user's cache folder keeps what was found (ops/dispatch.py). Work goes breadth first, so that a budget that is spent
early costs detail rather than operators. Under Triton's interpreter all steps run at tiny sizes and nothing is written, since its
timings mean nothing; on a CPU without it, the CPU's own file is written.
"""
import contextlib
import json
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import cases, nvrtc
from .bench import DTYPES, gpu_times, interleave, machine
from .cases import HEADS, Size
from .kernels import configs
from .ops import dispatch, registry
from .progress import Progress

BUDGET = 240.0  # seconds
MARGIN = 0.98   # what is chosen before the table's own order takes less than this share of its time
HOPELESS = 2.0  # a kernel this much slower than the fastest is not worth configuring


@dataclass(frozen=True)
class Item:
    """One step of work: an entry of cases.CASES at one size; `configure`: with its launch configurations."""
    case: str
    kind: str
    size: Size
    configure: bool

    @property
    def op(self) -> str:
        return self.case.split()[0]


@dataclass
class State:
    """What is known so far."""
    device: torch.device
    deadline: float
    rows: dict[tuple, dict] = field(default_factory=dict)       # (case, dtype, size, pass, in a graph) -> what was measured
    disabled: dict[tuple, str] = field(default_factory=dict)    # (op, dtype, backend) -> why
    configs: dict[tuple, dict] = field(default_factory=dict)    # (op, arch, dtype, shape) -> the fastest configuration

    def spent(self) -> bool:
        return time.monotonic() > self.deadline


def tune(device: str | torch.device, budget: float = BUDGET, quick: bool = False, operators: Sequence[str] | None = None,
         min_time: float = 0.02, quiet: bool = True) -> dict:
    """Check and time every backend, then launch configurations, until all is done or `budget` seconds are over; write what won.

    quick: DeiT-S only and no launch configurations. operators: all, by default. Returns the contents of the file with its path
    ("file", None where none is written), "kept" (what it has from an earlier one, not measured again), "left_out" and "seconds". Raises
    ValueError for a budget that is not positive and for an operator that does not exist.
    """
    if not budget > 0:
        raise ValueError(f"tune: budget must be > 0 seconds, got {budget}")
    unknown = [op for op in operators or () if op not in registry.TABLES]
    if unknown:
        raise ValueError(f"tune: operators must be among {', '.join(registry.TABLES)}, got {unknown[0]!r}")
    start, device = time.monotonic(), torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    name, pretended, lost = dispatch.card(device), interpreted(device), []
    state, left = State(device, start + budget), []
    items = plan(device, quick, pretended, operators)
    with Progress(len(items), quiet) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*failed its check on this card")  # it is checked anew
        for item in items:
            if state.spent() or lost:
                left.append(item)
                continue
            progress.say(f"{item.case} {item.kind}, {_describe(item.size)}" + (": launch configurations" if item.configure else ""))
            try:
                work(item, state, min_time)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                left.append(item)
            except torch.AcceleratorError as error:  # nothing more can run in this process
                lost.append(f"all that came after {item.case}, where the card failed: {str(error).splitlines()[0]}")
            progress.advance()
    missed, every = (Counter(f"{item.case} {item.kind}" for item in some) for some in (left, items))
    data = {"card": name, "versions": dispatch.versions(), "machine": machine(str(device)), "date": time.strftime("%Y-%m-%d"),
            **decide(state), "configs": _table(state.configs), "measured": list(state.rows.values())}
    path, kept = None, []
    if not pretended and name and (data["choices"] or data["disabled"]):
        path = dispatch.path_of(name)
        with contextlib.suppress(OSError, ValueError):  # a file that cannot be read is written anew
            kept = dispatch.keep(dispatch.read(path, name), data)
        nvrtc.write(path, (json.dumps(data, indent=1) + "\n").encode())
        registry.reload()
    missing = [f"{op}: no inputs are known (vitprune/cases.py)" for op in registry.TABLES if op not in {c.split()[0] for c in cases.CASES}]
    return {**data, "file": path and str(path), "kept": kept, "seconds": round(time.monotonic() - start, 1),
            "left_out": [*lost, *missing, *(f"{what}: {n} of {every[what]} steps" for what, n in missed.items())]}


def interpreted(device: torch.device) -> bool:
    """Whether Triton only pretends to run there."""
    if device.type != "cpu":
        return False
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def plan(device: torch.device, quick: bool, pretended: bool, operators: Sequence[str] | None = None) -> list[Item]:
    """The steps in order: every operator at two sizes, their configurations, other models, other batches and shares."""
    S, rest = HEADS["small"], (HEADS["base"], HEADS["tiny"])
    many, fewer = (128, 32) if device.type == "cuda" else (32, 128)  # what fills a card, what it answers at once
    waves = [[Size(1, S, 0.7), Size(many, S, 0.7)], [Size(B, H, 0.7) for H in rest for B in (many, 1)],
             [Size(B, H, keep) for keep in (1.0, 0.5) for H in (HEADS["base"], S) for B in (fewer, 8)]]
    kinds = ["float32", "bfloat16"]
    if device.type == "cuda":  # below 8.0 bfloat16 is emulated
        kinds = ["float16", "bfloat16", "float32"] if configs.capability(device) >= 80 else ["float16", "float32"]
    if pretended:
        waves, kinds = [[Size(2, 1, 0.5, tokens=9)]], ["float32"]
    able = {(case, kind): Trial(Item(case, kind, Size(1, 1, tokens=5), False), device).usable for kind in kinds for case in cases.CASES
            if operators is None or case.split()[0] in operators}
    return [Item(case, kind, size, configure) for wave in (waves[:1] if quick else waves) for configure in (False, True)[:1 if quick else 2]
            for (case, kind), names in able.items() if len(names) > 1 for size in wave
            if not configure or ("triton" in names and "dense" not in case)]  # what is configured by the same shape once, is timed so


class Trial:
    """A case with its inputs, ready to be run by any backend."""

    def __init__(self, item: Item, device: torch.device) -> None:
        self.item = item
        self.dtype = DTYPES[item.kind]
        self.function, self.args = cases.inputs(item.case, item.size, device, self.dtype)
        with registry.watch() as asked:
            outputs = self.run("reference", None)
        self.ups = cases.upstream(outputs)
        self.facts = next(facts for op, _, facts in asked if op == item.op)
        self.device = device
        self.usable = [name for name in registry.TABLES[item.op] if self.able(name, False)]
        self.passes = (False,) if item.op in cases.INFERENCE else (False, True)  # forward; forward and backward
        self.truth: list[Tensor] = []

    def able(self, name: str, backward: bool) -> bool:
        """Whether that backend can run forward, or with its gradient."""
        return registry.find(self.item.op, name).refuses(self.device, self.dtype, **{**self.facts, "grad": backward}) is None

    def run(self, name: str, ups: list[Tensor] | None, args: list[Tensor] | None = None, alone: bool = False) -> list[Tensor]:
        with registry.backend(name, self.item.op if alone else None):
            return cases.run(self.function, self.args if args is None else args, ups)

    def call(self, name: str, backward: bool) -> Callable[[], list[Tensor]]:
        """To be timed, as a model calls it: an operator that is composed of others runs them by what serves."""
        return lambda: self.run(name, self.ups if backward else None, alone=True)

    def fails(self, name: str) -> str | None:
        """Why a backend may not serve: an output or gradient further from float64 than twice the plain form's (+1e-5), or an error.

        One that runs forward only is checked by its outputs."""
        def wide(tensors):
            return [t.double() if t.is_floating_point() else t for t in tensors]

        def errors(outputs, truth):
            return [(o.double() - t.double()).abs().max().item() if t.numel() else 0.0 for o, t in zip(outputs, truth, strict=True)]
        if not self.truth:
            self.truth = self.run("reference", wide(self.ups), wide(self.args))
            self.allowed = [2 * e + 1e-5 for e in errors(self.run("reference", self.ups), self.truth)]
        try:
            outputs = self.run(name, self.ups if self.able(name, True) else None)
            got = errors(outputs, self.truth if self.able(name, True) else self.truth[:len(outputs)])
        except (torch.cuda.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        off = next(((i, e, a) for i, (e, a) in enumerate(zip(got, self.allowed)) if not e <= a), None)
        return off and f"result {off[0]} is off by {off[1]:.1e}, {off[2]:.1e} is allowed ({_describe(self.item.size)})"


def work(item: Item, state: State, min_time: float) -> None:
    """Check and time the backends of one case at one size, or first choose the configurations of its kernels."""
    trial = Trial(item, state.device)
    synchronise = torch.cuda.synchronize if state.device.type == "cuda" else lambda: None
    left = [name for name in trial.usable if (item.op, item.kind, name) not in state.disabled]
    if item.configure:
        timed = state.rows.get((item.case, item.kind, item.size, False, False), {"ms": {}})["ms"]
        if "triton" not in left or timed.get("triton", 0) > HOPELESS * min(timed.values(), default=1):
            return
        state.configs |= configure(trial, state, min_time, synchronise)
    with configs.probing(dict(state.configs)):
        for name in [name for name in left if name != "reference"]:
            try:
                reason = trial.fails(name)
            except torch.AcceleratorError as error:
                state.disabled[item.op, item.kind, name] = str(error).splitlines()[0]
                raise
            if reason:
                state.disabled[item.op, item.kind, name] = reason
                left.remove(name)
        for backward in trial.passes:
            calls = {name: trial.call(name, backward) for name in left if trial.able(name, backward)}
            times = interleave(calls, min_time=min_time, synchronise=synchronise)
            measured = {False: {name: statistics.median(t) for name, t in times.items()}}
            if state.device.type == "cuda":
                with registry.for_graph():
                    measured[True] = gpu_times(calls, state.device)
            for graph, ms in measured.items():
                facts = {**trial.facts, "grad": backward} | ({"graph": True} if graph else {})
                state.rows[item.case, item.kind, item.size, backward, graph] = {
                    "op": item.op, **dispatch.key(trial.dtype, facts), "size": vars(item.size),
                    "ms": {name: round(t, 5) for name, t in ms.items()}}


def configure(trial: Trial, state: State, min_time: float, synchronise: Callable[[], None]) -> dict[tuple, dict]:
    """The fastest launch configuration that passes the check, for each kernel that the case asks for one."""
    asked, chosen = {}, {}
    for backward in trial.passes:
        with configs.probing({}) as seen:
            trial.call("triton", backward)()
        asked[backward] = set(seen)
    for key in sorted(asked[trial.passes[-1]], key=str):
        # A kernel that only the gradient asks for, or one configuration for both directions, is timed with the gradient.
        backward = trial.passes[-1] and (key not in asked[False] or asked[False] == asked[True])
        ready = {}
        for i, option in enumerate(_candidates(*key)):
            if state.spent():
                break

            def call(option=option, key=key, backward=backward):
                with configs.probing({**chosen, key: option}):
                    return trial.call("triton", backward)()
            try:
                call()
            except torch.AcceleratorError:
                raise
            except Exception:  # a configuration may ask for more than the card has
                continue
            ready[str(i)] = (call, option)
        calls = {i: call for i, (call, _) in ready.items()}
        if state.device.type == "cuda":  # the same launch whatever the configuration: only the GPU's time tells them apart
            times = gpu_times(calls, state.device)
        else:
            times = {i: statistics.median(t) for i, t in interleave(calls, min_time=min_time, synchronise=synchronise).items()}
        for i in sorted(times, key=times.get):
            with configs.probing({**chosen, key: ready[i][1]}):
                if trial.fails("triton") is None:
                    chosen[key] = ready[i][1]
                    break
    return chosen


def _candidates(name: str, arch: int, dtype: torch.dtype, shape: tuple) -> Sequence[dict]:
    """What the kernel's file offers for a launch."""
    file = configs.kernel(name)
    return file.candidates(dtype, arch, **dict(shape)) if file else ()


def decide(state: State) -> dict:
    """{"choices", "disabled"} as they stand in a file: by the geometric mean over sizes and directions."""
    groups: dict[str, list[dict]] = {}
    for row in state.rows.values():
        groups.setdefault(json.dumps([row["op"], row["dtype"], row["facts"]]), []).append(row)
    choices = []
    for group, rows in groups.items():
        op, kind, facts = json.loads(group)
        names = [b.name for b in registry.order(op, state.device, getattr(torch, kind), **facts)  # as `registry.choose` does
                 if all(b.name in row["ms"] for row in rows) and (op, kind, b.name) not in state.disabled]
        first = names[0]
        share = {n: math.exp(statistics.fmean(math.log(row["ms"][n] / row["ms"][first]) for row in rows)) for n in names}
        best = min(names, key=share.get)
        best = best if share[best] < MARGIN else first
        choices.append({"op": op, "dtype": kind, "facts": facts, "backend": best, "instead_of": first,
                        "speedup": round(1 / share[best], 3), "sizes": len(rows)})
    return {"choices": choices, "disabled": [{"op": op, "dtype": kind, "backend": name, "reason": reason}
                                             for (op, kind, name), reason in state.disabled.items()]}


def _table(chosen: dict[tuple, dict]) -> dict:
    table: dict = {}
    for (op, _, dtype, shape), config in chosen.items():
        table.setdefault(op, {}).setdefault(str(dtype).removeprefix("torch."), []).append({"shape": dict(shape), "config": config})
    return table


def _describe(size: Size) -> str:
    return f"batch {size.B}, {size.tokens} tokens, {size.H} heads, keep {size.keep}"


def text(result: dict) -> str:
    """The result of `tune` for people."""
    lines = [f"{result['card']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + f": {result['seconds']} s"]
    lines += [f"  {c['op']:17} {dispatch.describe(c):40} {c['backend']:10}" + (
        "" if c["backend"] == c["instead_of"] else f" {c['speedup']:.2f} times as fast as {c['instead_of']}") for c in result["choices"]]
    lines += [f"disabled: {d['op']} {d['backend']} for {d['dtype']}: {d['reason']}" for d in result["disabled"]]
    lines += [f"not tuned: {what}" for what in result["left_out"]]
    lines += [f"kept as tuned before: {', '.join(result['kept'])}"] if result["kept"] else []
    return "\n".join([*lines, f"written to {result['file']}" if result["file"] else
                      "nothing is written: " + ("Triton's interpreter is on, its timings mean nothing" if interpreted(torch.device("cpu"))
                                                else "nothing was measured")])


def add_arguments(parser) -> None:
    """The options of `vitprune tune`."""
    parser.add_argument("--device", type=str, help="cpu or cuda; by default the GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="DeiT-S only, no launch configurations")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which it stops and says what is not tuned")


def main(device: str, quick: bool, budget: float, as_json: bool) -> None:
    """Run `vitprune tune` and print what it found."""
    result = tune(device, budget, quick, quiet=False)
    print(json.dumps(result) if as_json else text(result))
