"""The sizes and inputs at which operators are checked and timed, by `vitprune tune` and by bench/: those of DeiT.

A new operator joins both with an entry in CASES.
"""
import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import ops
from .ops import registry
from .tokens import TokenPredictor

HEADS = {"tiny": 3, "small": 6, "base": 12}  # DeiT; every head is 64 wide
KEEPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
BATCHES = (1, 8, 32, 128, 512, 1024)
TOKENS = 197
MASKS = Path(__file__).with_name("masks.json")  # written by bench/masks.py
# Where the gradient is not worth timing.
INFERENCE = ("select_tokens", "select_norm", "score_tokens", "compact_tokens", "expand_rows", "layer_norm")


@dataclass(frozen=True)
class Size:
    """B images of `tokens` tokens, of which a share `keep` is left, in a model with H heads of 64 channels."""
    B: int
    H: int
    keep: float = 1.0
    tokens: int = TOKENS

    @property
    def kept(self) -> int:
        """Tokens that are left, the class token among them."""
        return 1 + int((self.tokens - 1) * self.keep)


@functools.cache
def _trained() -> dict:
    return json.loads(MASKS.read_text())


def live(C: int, share: float, what: str) -> Tensor:
    """Ids of the "heads" or "hidden" blocks of a layer of C channels that movement pruning left alive, int32 [L]; all for a share of 1,
    and as many up to the last for a width or share at which nothing was trained."""
    blocks, trained = {"heads": 1, "hidden": 4}[what] * C // 64, _trained().get(str(C), {}).get(str(share))
    ids = trained[what] if trained and share < 1 else range(blocks - max(1, round(blocks * share)), blocks)
    return torch.tensor([*ids], dtype=torch.int32)


class _Maker:
    """Random tensors, the same ones for the same seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.generator = device, dtype, torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=self.device, generator=self.generator)).to(self.dtype)

    def mask(self, *shape: int, share: float) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator) < share

    def live(self, s: Size, what: str) -> Tensor:
        return live(64 * s.H, s.keep, what).to(self.device)


def _select_tokens(s: Size, make: _Maker):
    return (lambda x, scores: ops.select_tokens(x, scores, s.kept - 1)), [
        make.normal(s.B, s.tokens, 64 * s.H), make.normal(s.B, s.tokens - 1)]


def _select_norm(s: Size, make: _Maker):
    (x, scores), C = _select_tokens(s, make)[1], 64 * s.H
    return (lambda x, scores, w, b: ops.select_norm(x, scores, s.kept - 1, w, b, 1e-6)), [x, scores, make.normal(C), make.normal(C)]


def _compact_tokens(s: Size, make: _Maker):
    return (lambda x, keep: ops.compact_tokens(x, keep, capacity=keep.numel())), [
        make.normal(s.B, s.tokens, 64 * s.H), make.mask(s.B, s.tokens, share=s.keep)]


def _expand_rows(s: Size, make: _Maker):
    x, keep = _compact_tokens(s, make)[1]
    with registry.backend("reference"):
        return ops.expand_rows, [*ops.compact_tokens(x, keep, capacity=keep.numel()), keep]


def _add_norm(s: Size, make: _Maker):
    C = 64 * s.H
    return (lambda x, r, w, b: ops.add_norm(x, r, w, b, 1e-6)), [
        make.normal(s.B, s.kept, C), make.normal(s.B, s.kept, C), make.normal(C), make.normal(C)]


def _layer_norm(s: Size, make: _Maker):
    C = 64 * s.H
    return (lambda x, w, b: ops.layer_norm(x, w, b, 1e-6)), [make.normal(s.B, s.kept, C), make.normal(C), make.normal(C)]


def _short_attention(s: Size, make: _Maker):
    return (lambda qkv: ops.short_attention(qkv, num_heads=s.H)), [make.normal(s.B, s.kept, 3 * 64 * s.H)]


def _packed_attention(s: Size, make: _Maker):
    def run(qkv, ends):
        return ops.short_attention(qkv, num_heads=s.H, cu_seqlens=ends, max_seqlen=s.kept)
    ends = torch.arange(0, (s.B + 1) * s.kept, s.kept, dtype=torch.int32, device=make.device)
    return run, [make.normal(s.B * s.kept, 3 * 64 * s.H), ends]


def _policy_attention(s: Size, make: _Maker):
    """In training all tokens stay: the policy says which count."""
    def run(qkv, policy):
        return ops.policy_attention(*ops.split_qkv(qkv, s.H), policy)
    return run, [make.normal(s.B, s.tokens, 3 * 64 * s.H), make.mask(s.B, s.tokens, share=s.keep).to(make.dtype)]


def _score_tokens(s: Size, make: _Maker):
    predictor = TokenPredictor(64 * s.H).to(make.device, make.dtype)
    of = {make.dtype: predictor, torch.float64: copy.deepcopy(predictor).double()}  # the check's truth is float64
    return (lambda x: ops.score_tokens(x, of[x.dtype])), [make.normal(s.B, s.kept - 1, 64 * s.H)]


def _sliced_linear(s: Size, make: _Maker, side: str):
    """q, k and v of the live heads, or the projection of what they give."""
    C, live = 64 * s.H, make.live(s, "heads")
    if side == "out":
        live = torch.cat([live + i * s.H for i in range(3)])
    O, I, width = (3 * C, C, C) if side == "out" else (C, C, 64 * live.shape[0])  # noqa: E741
    return (lambda x, w, b, live: ops.sliced_linear(x, w, b, live, side=side)), [
        make.normal(s.B, s.tokens, width), make.normal(O, I, scale=I ** -0.5), make.normal(O), live]


def _sliced_mlp(s: Size, make: _Maker):
    C = 64 * s.H
    return (lambda x, w1, b1, w2, b2, live, residual: ops.sliced_mlp(x, w1, b1, w2, b2, live, residual=residual)), [
        make.normal(s.B, s.tokens, C), make.normal(4 * C, C, scale=C ** -0.5), make.normal(4 * C),
        make.normal(C, 4 * C, scale=(4 * C) ** -0.5), make.normal(C), make.live(s, "hidden"), make.normal(s.B, s.tokens, C)]


def _dense_mlp(s: Size, make: _Maker):
    """Of a compacted model: a share of the hidden units is left, the tokens are all there."""
    C, hidden = 64 * s.H, 64 * max(1, round(4 * s.H * s.keep))
    return (lambda x, w1, b1, w2, b2, residual: ops.sliced_mlp(x, w1, b1, w2, b2, None, residual=residual)), [
        make.normal(s.B, s.tokens, C), make.normal(hidden, C, scale=C ** -0.5), make.normal(hidden),
        make.normal(C, hidden, scale=hidden ** -0.5), make.normal(C), make.normal(s.B, s.tokens, C)]


CASES: dict[str, Callable] = {  # operator, or operator and form -> (function, its tensors)
    "select_tokens": _select_tokens, "select_norm": _select_norm, "compact_tokens": _compact_tokens, "expand_rows": _expand_rows,
    "add_norm": _add_norm, "layer_norm": _layer_norm,
    "short_attention": _short_attention, "short_attention packed": _packed_attention, "policy_attention": _policy_attention,
    "score_tokens": _score_tokens,
    "sliced_linear out": lambda s, make: _sliced_linear(s, make, "out"), "sliced_linear in": lambda s, make: _sliced_linear(s, make, "in"),
    "sliced_mlp": _sliced_mlp, "sliced_mlp dense": _dense_mlp,
}


def inputs(case: str, size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """(function, its tensors) of an entry of CASES, with the same random values every time; a share of blocks or of tokens is live."""
    return CASES[case](size, _Maker(device, dtype))


def run(function: Callable, args: Sequence[Tensor], ups: Sequence[Tensor] | None) -> list[Tensor]:
    """The outputs; with `ups`, the gradients of the differentiable outputs, those of the differentiable inputs as well."""
    if ups is None:
        with torch.inference_mode():
            return _list(function(*args))
    leaves = [a.detach().requires_grad_(a.is_floating_point()) for a in args]
    out = _list(function(*leaves))
    grads = torch.autograd.grad([o for o in out if o.requires_grad], [a for a in leaves if a.requires_grad], ups, allow_unused=True)
    return [*(o.detach() for o in out), *(g for g in grads if g is not None)]


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A random gradient of every floating point output."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(o.shape, device=o.device, generator=generator).to(o.dtype) for o in outputs if o.is_floating_point()]


def _list(out) -> list[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def calls(functions: dict, args: list, ups: list, backward: bool) -> tuple[dict, dict]:
    """(what can be called, why the rest cannot); a string instead of a function is a reason why there is none."""
    ready, refused = {}, {}
    for name, function in functions.items():
        def call(function=function):
            out = function(*args)
            return torch.autograd.grad(out, args, ups, allow_unused=True) if backward else out
        try:
            if isinstance(function, str):
                raise RuntimeError(function)
            call()
            ready[name] = call
        except Exception as e:  # what fails here is a reason, not the end of the table
            refused[name] = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
    return ready, refused
