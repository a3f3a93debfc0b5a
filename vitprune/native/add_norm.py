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
        _launch(OP, eps, x=x.to(s.dtype), residual=residual, weight=weight, bias=bias, gamma=gamma, s=s, y=y)
    return s, y


def backward_cuda(ds: Tensor, dy: Tensor, s: Tensor, residual: Tensor, weight: Tensor, gamma: Tensor | None,
                  eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in the dtype of s), residual, weight, bias and gamma (0 without one), in two launches."""
    dx, dresidual = (torch.empty(s.shape, dtype=t.dtype, device=s.device) for t in (s, residual))
    vectors = [torch.zeros(weight.shape, dtype=weight.dtype, device=s.device) if s.numel() == 0 else
               torch.empty(weight.shape, dtype=weight.dtype, device=s.device) for _ in range(3)]
    if s.numel():
        _launch(f"{OP}_backward", eps, residual=residual, weight=weight, gamma=gamma, s=s, ds=ds.to(s.dtype), dy=dy.to(s.dtype), dx=dx,
                dresidual=dresidual, **dict(zip(("dweight", "dbias", "dgamma"), vectors)))
    return dx, dresidual, *vectors


def _launch(name: str, eps: float, **tensors: Tensor | None) -> None:
    """The kernel of that name over rows [R / N, N, C], a copy only where channels do not lie side by side; tensors: of POINTERS."""
    s, weight = tensors["s"], tensors["weight"]
    C, R, device = s.shape[-1], s.numel() // s.shape[-1], s.device
    tensors |= {key: t if t is None else _rows(t) for key, t in tensors.items() if key in STRIDED}
    N, residual = tensors["s"].shape[1], tensors["residual"]
    vectors = {key: t.contiguous() for key in ("weight", "bias", "gamma") if (t := tensors.get(key)) is not None}
    wide = {t.dtype for t in vectors.values()} != {s.dtype}  # float32 holds them all
    tensors |= {key: t.float() if wide else t for key, t in vectors.items()}
    unit = 16 // residual.element_size()  # its numbers are the narrowest
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
        tensors["partial"] = torch.empty(3, P, C, dtype=torch.float32, device=device)
    pointers, strided = ([tensors.get(key) for key in keys] for keys in (POINTERS, STRIDED))
    strides = tuple(n for t in strided for n in ((0, 0) if t is None else t.stride()[:2]))
    params = _native.AddNormParams(tuple(0 if t is None else t.data_ptr() for t in pointers), strides, (R, N, C, P), eps, lanes, wide)
    kernel = f"{name}_{KINDS[s.dtype]}_{KINDS[residual.dtype]}_{'wide' if fits else 'single'}"
    native.launch(OP, kernel, (blocks, 1), threads, params, device)
    if name != OP:
        native.launch(OP, f"{OP}_sum_{KINDS[weight.dtype]}", (-(-C // 32), 3), 256, params, device)


def _rows(t: Tensor) -> Tensor:
    """[batch, rows, C] with channels side by side."""
    t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    return t.reshape(-1, *t.shape[-2:]) if t.dim() > 1 else t[None, None]
