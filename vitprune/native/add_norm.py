"""`vitprune.ops.add_norm` in CUDA C++."""
import torch
from torch import Tensor

from .. import native
from . import KINDS, _native

OP = "add_norm"
HELD, MAX_CHANNELS = 8, 4096  # channels of a row in a thread, as in csrc/cuda/add_norm.cu, and in a block
POINTERS = ("x", "residual", "weight", "bias", "gamma", "s", "y", "ds", "dy", "dx", "dresidual", "partial", "dweight", "dbias", "dgamma")
STRIDED = ("x", "residual", "s", "ds", "dy")


def refuses(device: torch.device, dtype: torch.dtype, *, residual: torch.dtype = torch.float32, weight: torch.dtype = torch.float32,
            gamma: torch.dtype = torch.float32, wide: bool = False, **_) -> str | None:
    """Why no launch can serve, or None. dtype: of x; residual, weight, gamma: their dtypes; wide: C > MAX_CHANNELS."""
    if reason := native.reason_cuda(device, OP):
        return reason
    for kind in (dtype, residual, weight, gamma):
        if kind not in KINDS:
            return f"no kernel for {kind}"
    return f"more channels than the {MAX_CHANNELS} that a block can hold" if wide else None


def cuda(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """One launch; both outputs have the dtype of the sum."""
    dtype = torch.result_type(x, residual)
    s = torch.empty(x.shape, dtype=dtype if gamma is None else torch.promote_types(dtype, gamma.dtype), device=x.device)
    y = torch.empty_like(s)
    if s.numel():
        _launch(OP, eps, residual.dtype, x=x.to(s.dtype), residual=residual, weight=weight, bias=bias, gamma=gamma, s=s, y=y)
    return s, y


def alike(s: Tensor, residual: Tensor, gamma: Tensor | None) -> bool:
    """Whether the gradients of x (in the dtype of s) and of the residual are one: nothing but x + residual lies before them."""
    return gamma is None and residual.dtype == s.dtype


def outputs(s: Tensor, residual: Tensor, weight: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of x, residual, weight, bias and gamma; empty are gamma's without one and the residual's where x's is the
    same. The others' vectors are zero where there is no row to sum."""
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dresidual = torch.empty(0 if alike(s, residual, gamma) else s.shape, dtype=residual.dtype, device=s.device)
    make = weight.new_empty if s.numel() else weight.new_zeros
    return dx, dresidual, make(weight.shape), make(weight.shape), make(0 if gamma is None else weight.shape)


def backward_cuda(ds: Tensor, dy: Tensor, s: Tensor, residual: Tensor, weight: Tensor, gamma: Tensor | None,
                  eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`outputs`, written in two launches."""
    results = outputs(s, residual, weight, gamma)
    if s.numel():
        written = {name: t for name, t in zip(("dx", "dresidual", "dweight", "dbias", "dgamma"), results) if t.numel()}
        _launch(f"{OP}_backward", eps, residual.dtype, residual=None if gamma is None else residual, weight=weight, gamma=gamma, s=s,
                ds=ds.to(s.dtype), dy=dy.to(s.dtype), **written)
    return results


def _launch(name: str, eps: float, kind: torch.dtype, **tensors: Tensor | None) -> None:
    """The kernel of that name over rows [R / N, N, C], a copy only where channels do not lie side by side; tensors: of POINTERS; kind: the
    residual's dtype."""
    s, weight = tensors["s"], tensors["weight"]
    C, R, device = s.shape[-1], s.numel() // s.shape[-1], s.device
    tensors |= {key: t if t is None else _rows(t) for key, t in tensors.items() if key in STRIDED}
    N = tensors["s"].shape[1]
    vectors = {key: t.contiguous() for key in ("weight", "bias", "gamma") if (t := tensors.get(key)) is not None}
    wide = {t.dtype for t in vectors.values()} != {s.dtype}  # float32 holds them all
    tensors |= {key: t.float() if wide else t for key, t in vectors.items()}
    unit = 16 // kind.itemsize  # its numbers are the narrowest
    given = [t for key in (*STRIDED, *vectors) if (t := tensors.get(key)) is not None]
    fits = C % unit == 0 and all(t.data_ptr() % (unit * t.element_size()) == 0 and all(n % unit == 0 for n in t.stride()[:-1])
                                 for t in given)
    lanes = -(-C // HELD)  # threads of a row
    lanes = 1 << (lanes - 1).bit_length() if lanes <= 32 else -(-lanes // 32) * 32
    # Up to 128 threads a block, fewer where that leaves multiprocessors idle.
    width, processors = max(lanes, 32), native.processors(device.index)
    threads = width * max(1, min(128 // width, R * lanes // (width * processors)))
    P = blocks = -(-R * lanes // threads)
    if name != OP:
        P = blocks = min(blocks, 4 * processors)
        sums = 2 if tensors["gamma"] is None else 3
        tensors["partial"] = torch.empty(sums, P, C, dtype=torch.float32, device=device)
    pointers, strided = ([tensors.get(key) for key in keys] for keys in (POINTERS, STRIDED))
    strides = tuple(n for t in strided for n in ((0, 0) if t is None else t.stride()[:2]))
    params = _native.AddNormParams(tuple(0 if t is None else t.data_ptr() for t in pointers), strides, (R, N, C, P), eps, lanes, wide)
    kernel = f"{name}_{KINDS[s.dtype]}_{KINDS[kind]}_{'wide' if fits else 'single'}"
    native.launch(OP, kernel, (blocks, 1), threads, params, device)
    if name != OP:
        native.launch(OP, f"{OP}_sum_{KINDS[weight.dtype]}", (-(-C // 32), sums), 256, params, device)


def _rows(t: Tensor) -> Tensor:
    """[batch, rows, C] with channels side by side."""
    t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    return t.reshape(-1, *t.shape[-2:]) if t.dim() > 1 else t[None, None]
