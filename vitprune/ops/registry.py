"""How an operator is registered and which of its backends runs: one table per operator, chosen in one place."""
import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from . import dispatch

LARGE = 4096  # rows of tokens, twenty images of DeiT: where the card's speed counts and no longer the host's
LIBRARY = torch.library.Library("vitprune", "DEF")
TABLES: dict[str, dict[str, "Backend"]] = {}   # operator -> backends by name, in the order for cards that nobody measured
MACS: dict[str, Callable[..., int]] = {}       # operator -> multiply-accumulates from the shapes of its arguments
RUN: dict[str, Callable] = {}                  # registered operator -> what computes it
CAST: dict[str, list[bool]] = {}               # registered operator -> which arguments autocast takes to its dtype
GRADIENTS: dict[str, type[torch.autograd.Function]] = {}
KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


class _Local(threading.local):
    """What a thread has chosen; defaults of the class, since a `getattr` that finds nothing takes longer than all else in `choose`."""
    forced: str | None = None
    only: str | None = None  # the operator that it is forced for; None: all
    graph = False
    asked: list | None = None


_local = _Local()


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    `run` takes the operator's arguments. A `composite` backend is plain PyTorch: it is called as it stands, so that
    autograd, autocast, `torch.compile` and `torch.export` see through it. A kernel goes through the dispatcher.
    `refuses(device, dtype, **facts)` says why it cannot serve, or returns None; `yields(device, dtype, **facts)` whether it lets those
    that follow it in the table go first.
    """
    name: str
    run: Callable
    composite: bool = False
    refuses: Callable[..., str | None] = lambda device, dtype, **facts: None
    yields: Callable[..., bool] = lambda device, dtype, **facts: False


@contextlib.contextmanager
def backend(name: str, op: str | None = None) -> Iterator[None]:
    """Force the backend of that name, in this thread, for every operator called inside that has one; or for `op` alone, whose parts then
    choose as always where they are operators too.

    Raises ValueError for a name no operator (or not `op`) knows, RuntimeError inside of what torch.compile traces, where it would have no
    effect: choose around the compiled function. An operator that has the backend but cannot use it raises
    RuntimeError with the reason; an operator that does not have it chooses as always. A graph that torch.compile has
    traced keeps the choice made when it was traced. What torch.utils.checkpoint recomputes in a backward pass is computed outside of the
    `with`, and on a GPU in another thread: let the checkpointed function choose by itself.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("backend: it must be chosen around the compiled function, not inside of it")
    if op is not None and op not in TABLES:
        raise ValueError(f"backend: op must be one of {', '.join(TABLES)}, got {op!r}")
    known = sorted({name for table in TABLES.values() for name in table} if op is None else TABLES[op])
    if name not in known:
        raise ValueError(f"backend: name must be one of {', '.join(known)}, got {name!r}")
    previous = _local.forced, _local.only
    _local.forced, _local.only = name, op
    try:
        yield
    finally:
        _local.forced, _local.only = previous


@contextlib.contextmanager
def for_graph() -> Iterator[None]:
    """Inside, backends are chosen for a CUDA graph, by the time on the GPU alone: the host's, most of a small call, does not count there.
    Around the capture and the calls before it, which compile and load what it launches."""
    previous, _local.graph = _local.graph, True
    try:
        yield
    finally:
        _local.graph = previous


@torch.compiler.assume_constant_result  # the choice is made when a graph is traced, never inside it
def choose(op: str, device: torch.device, dtype: torch.dtype, **facts) -> str:
    """The name of the backend that serves operator `op` on that device and dtype; `facts` are static sizes.

    The one measured fastest on that card (vitprune/ops/dispatch.py), else the first of the table that can run.
    """
    forced = _local.forced if _local.only is None or _local.only == op else None
    if torch.compiler.is_exporting() or (torch._C._is_tracing() and forced is None):
        # an exported graph must run where this package is not installed
        return next(b.name for b in TABLES[op].values() if b.composite)
    dual = torch.autograd.forward_ad._current_level >= 0  # kernels would drop the tangents
    if dual or torch._C._are_functorch_transforms_active():
        if forced in TABLES[op] and not TABLES[op][forced].composite:
            lacks = "forward-mode derivative" if dual else "form that torch.func transforms"
            raise RuntimeError(f"{op}: backend {forced!r} has no {lacks}; 'reference' has one")
        return forced if forced in TABLES[op] else "reference"
    if autocasts(device) and any(CAST.get(op, ())) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)  # what a kernel will be given
    facts["grad"] = torch.is_grad_enabled()  # what is fastest forward need not be so with its gradient
    if _local.graph:
        facts["graph"] = True
    if _local.asked is not None:
        _local.asked.append((op, dtype, facts))
    return _choose(op, device, dtype, tuple(facts.items()), forced)


@torch.compiler.assume_constant_result
def plain_form(op: str, name: str) -> str:
    """What serves where no kernel can: the composite backend of that name, or another one that is forced."""
    forced, entries = _local.forced if _local.only is None or _local.only == op else None, TABLES[op]
    return forced if forced in entries and entries[forced].composite else name


@functools.lru_cache(maxsize=1024)
def _choose(op: str, device: torch.device, dtype: torch.dtype, facts: tuple, forced: str | None) -> str:
    entries, measured, facts = TABLES[op], dispatch.of(device), dict(facts)
    disabled = measured.disabled(op, dtype)
    if forced in entries:
        if reason := entries[forced].refuses(device, dtype, **facts):
            if facts["grad"] and entries[forced].refuses(device, dtype, **facts | {"grad": False}) is None:
                reason += "; inside of torch.no_grad() it can"
            raise RuntimeError(f"{op}: backend {forced!r} cannot run here: {reason}")
        if forced in disabled:
            warnings.warn(f"{op}: backend {forced!r} {disabled[forced]}", stacklevel=2)
        return forced
    winner = measured.winner(op, dtype, facts)
    for entry in sorted(order(op, device, dtype, **facts), key=lambda b: b.name != winner):  # stable: the rest in order
        if entry.name not in disabled and entry.refuses(device, dtype, **facts) is None:
            return entry.name
    raise RuntimeError(f"{op}: no backend can run on {device} with {dtype}")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for that device; the first question is quick and mostly answers."""
    return torch._C._is_any_autocast_enabled() and device.type in KEYS and torch.is_autocast_enabled(device.type)


def transformed() -> bool:
    """Whether torch.compile, a trace, torch.func or forward-mode differentiation sees what is called now."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0)


def large(rows: int) -> bool:
    """Whether so many rows of tokens make a call large: the size that backends are chosen by. A branch on the number, not the
    number, so that a graph with dynamic sizes has a constant to choose by; an exported one takes any size and chooses nothing."""
    if exporting():
        return False
    return True if rows >= LARGE else False


@torch.compiler.assume_constant_result  # torch 2.11 takes its own function for true in all that it compiles
def exporting() -> bool:
    """Whether torch.export traces this."""
    return torch.compiler.is_exporting()


def order(op: str, device: torch.device, dtype: torch.dtype, **facts) -> list[Backend]:
    """The backends of `op` in order for a card not measured: those that yield come last."""
    return sorted(TABLES[op].values(), key=lambda b: b.yields(device, dtype, **facts))


def table(op: str, device: torch.device, dtype: torch.dtype = torch.float32, **facts) -> dict[str, str | None]:
    """Every backend of `op` with its reason not to serve that device and dtype (None: it can), in order for a card not measured."""
    disabled = dispatch.of(device).disabled(op, dtype)
    return {b.name: b.refuses(device, dtype, **facts) or disabled.get(b.name) for b in order(op, device, dtype, **facts)}


def reload() -> None:
    """Read what was measured on this machine's cards anew."""
    dispatch.of.cache_clear()
    _choose.cache_clear()


@contextlib.contextmanager
def watch() -> Iterator[list[tuple[str, torch.dtype, dict]]]:
    """Collects (op, dtype, facts) of every choice that this thread makes inside."""
    _local.asked = asked = []
    try:
        yield asked
    finally:
        _local.asked = None


def interpreted(device: torch.device, *_, **__) -> bool:
    """Whether Triton's kernels are interpreted there, slowly."""
    return device.type == "cpu"


def serve(op: str, *backends: Backend) -> None:
    """Set the table of `op`: its backends in order of choice."""
    TABLES[op] = {b.name: b for b in backends}


def find(op: str, name: str) -> Backend:
    """The backend of that name in the table of `op`."""
    return TABLES[op][name]


def call(op: str, name: str, *args):
    """Run a backend chosen before: composite ones directly, kernels as registered (gradient, fake, autocast)."""
    entry = TABLES[op][name]
    return entry.run(*args) if entry.composite else run(op, *args, name)


def run(op: str, *args):
    """torch.ops.vitprune.op(*args); in eager mode without PyTorch's dispatcher, whose detours through Python take longer than a kernel."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if _watched(tensors):
        return getattr(torch.ops.vitprune, op)(*args)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if recorded and op not in GRADIENTS:  # PyTorch says so if it is differentiated
        return getattr(torch.ops.vitprune, op)(*args)
    target, device = GRADIENTS[op].apply if recorded else RUN[op], tensors[0].device
    if autocasts(device):
        return _autocast(target, KEYS[device.type], device.type, CAST[op], *args)
    return target(*args)


def _watched(tensors: Sequence[Tensor]) -> bool:
    """Whether anyone needs to see the operator: a compiler, a tracer, a mode, a transform, a profiler, a kind of tensor of their own,
    a view whose sign is only noted, gradients in batches."""
    if (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active() or torch.autograd._profiler_enabled()):
        return True
    for t in tensors:
        if (type(t) is not Tensor and type(t) is not Parameter or not (t.is_cpu or t.is_cuda) or t.is_neg()
                or torch._C._functorch.is_legacy_batchedtensor(t)):
            return True
    return False


def define(op: str, schema: str, run: Callable, fake: Callable, *, cast: Sequence[str] = (), macs: Callable | None = None):
    """Register `vitprune::op`: `run` on every device, its shapes, its autocast rule and its cost.

    cast: the arguments that autocast takes to its dtype where they are floating point; the others stay as they are.
    macs: multiply-accumulates from the shapes of the arguments; registered with torch's counter as 2 FLOPs each.
    """
    LIBRARY.define(op + schema)
    RUN[op] = _describes(op, run)
    LIBRARY.impl(op, RUN[op], "CompositeExplicitAutograd")
    torch.library.register_fake(f"vitprune::{op}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.vitprune, op).default
    CAST[op] = [argument.name in cast for argument in overload._schema.arguments]
    for device, key in KEYS.items():
        LIBRARY.impl(op, functools.partial(_autocast, overload, key, device, CAST[op]), key.name)
    if macs is not None:
        MACS[op] = macs
        register_flop_formula(getattr(torch.ops.vitprune, op))(lambda *shapes, out_shape=None, **_: 2 * macs(*shapes))


def _describes(op: str, run: Callable) -> Callable:
    """`run`, whose failures name the operator and the shapes it was given: a kernel knows only addresses."""
    @functools.wraps(run)
    def described(*args):
        try:
            return run(*args)
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # out of memory, say, which callers catch by its type
                raise
            given = ", ".join(f"{list(a.shape)} {str(a.dtype).removeprefix('torch.')}" for a in args if isinstance(a, Tensor))
            raise RuntimeError(f"{op}: {str(error).removeprefix(f'{op}: ')} (given {given})") from error
    return described


def _autocast(target: Callable, key, device: str, cast: Sequence[bool], *args):
    dtype = torch.get_autocast_dtype(device)

    def convert(a):
        floating = isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64
        return a.to(dtype) if floating else a

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return target(*(convert(a) if wanted else a for a, wanted in zip(args, cast)))


def gradient(op: str, backward: Callable, setup: Callable) -> None:
    """Attach the gradient of `vitprune::op`; where an operator of its own computes it, `op`_backward, that has none, and says so."""
    def no_more(ctx, *_) -> NoReturn:
        raise RuntimeError(f"{op}: kernels have no second derivative; `with vitprune.ops.backend('reference')` has one")
    second = f"{op}_backward"
    for name, formula, prepare in ((op, backward, setup), (second, no_more, lambda ctx, inputs, output: None)):
        if name not in RUN:
            continue
        torch.library.register_autograd(f"vitprune::{name}", formula, setup_context=prepare, lib=LIBRARY)

        def forward(ctx, *args, name=name, prepare=prepare):  # a Function with setup_context reads its signature in every call
            output = RUN[name](*args)
            prepare(ctx, args, output)
            return output
        GRADIENTS[name] = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(formula)})
