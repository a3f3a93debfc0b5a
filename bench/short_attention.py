"""short_attention beside PyTorch's attentions: `python -m bench.short_attention [DEVICE]` prints JSON."""
import functools

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.add_norm import KEEPS
from bench.common import forced, kernels, kinds, main, share_of_limit, timed
from vitprune import cases
from vitprune.bench import DTYPES
from vitprune.cases import BATCHES, HEADS, Size, calls
from vitprune.ops import short_attention
from vitprune.ops.short_attention import _pad, _unpad


def shapes(device: torch.device, brief: bool):
    if device.type != "cuda":
        return [(1, 197, 6), (1, 97, 6), (8, 197, 6), (32, 97, 6)]
    if brief:
        return [(1, 138, 6), (128, 138, 12), (128, 197, 12), (128, 138, 6), (1, 138, 12)]
    return [(B, N, H) for H in HEADS.values() for B in BATCHES
            for N in ({*KEEPS.values(), 68, 97} if B in (1, 128) else (197, 138, 97, 68))]


def heads(x: torch.Tensor, H: int):
    """[B, N, 3*H*64] -> q, k, v [B, H, N, 64], views."""
    return x.unflatten(-1, (3, H, 64)).permute(2, 0, 3, 1, 4).unbind(0)


def merged(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).flatten(2)


def sdpa(x, H: int, only: SDPBackend, masked: bool = False):
    q, k, v = heads(x, H)
    mask = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool, device=x.device) if masked else None
    with sdpa_kernel(only):
        return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def flex(x, H: int):
    from torch.nn.attention.flex_attention import flex_attention
    return merged(flex_attention(*heads(x, H)))


def varlen(x, H: int, ends, longest: int):
    from torch.nn.attention.varlen import varlen_attn
    q, k, v = x.unflatten(-1, (3, H, 64)).unbind(1)
    return varlen_attn(q, k, v, ends, ends, longest, longest).flatten(1)


def ours(x, H: int, ends=None, longest: int | None = None):
    return short_attention(x, num_heads=H, cu_seqlens=ends, max_seqlen=longest)


def packed(x, H: int, function):
    """function(rows, H, ends, longest) over a dense batch."""
    B, N, _ = x.shape
    ends = torch.arange(0, (B + 1) * N, N, dtype=torch.int32, device=x.device)
    return function(x.flatten(0, 1), H, ends, N).view(B, N, H * 64)


def candidates(device: torch.device, dtype: torch.dtype) -> dict:
    """Name -> function(x, H), or the reason why there is none; every one takes the fused qkv and gives rows."""
    found = {"eager": forced("reference", ours), "compiled": forced("reference", torch.compile(ours, dynamic=False)),
             "library": forced("library", ours), "flex": torch.compile(flex, dynamic=False),
             "varlen": functools.partial(packed, function=varlen)}
    for only in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for masked in (False, True):
            found[f"sdpa {only.name.lower()}" + " mask" * masked] = functools.partial(sdpa, only=only, masked=masked)
    for rows, function in ((False, ours), (True, functools.partial(packed, function=ours))):
        found |= {name + " packed" * rows: call for name, call in kernels("short_attention", device, dtype, function, packed=rows).items()}
    return found


def waste(N: int) -> dict:
    """Scores computed for each one needed, by the rows and keys of a tile; and by the kernel's own tiles."""
    up = lambda size: -(-N // size) * size  # noqa: E731
    return {"128x64": up(128) * up(64) / N ** 2, "64x64": up(64) ** 2 / N ** 2, "64x16, ours": up(64) * up(16) / N ** 2,
            "32x16, ours": up(32) * up(16) / N ** 2}


def uneven(device: torch.device, kind: str, min_time: float, B: int = 32, H: int = 6) -> dict:
    """A row for packed rows of 100 tokens on average (deviation 25), beside varlen and SDPA over the batch padded to the longest,
    which is padded before and, in "pad, sdpa, unpad", in every call."""
    generator = torch.Generator().manual_seed(0)
    lengths = (100 + 25 * torch.randn(B, generator=generator)).round().clamp(1, 196).int()
    ends, longest = F.pad(lengths.cumsum(0), (1, 0)).int().to(device), int(lengths.max())
    x = torch.randn(int(ends[-1]), 3 * H * 64, generator=generator).to(device, DTYPES[kind])
    padded, keep = _pad(x, ends, longest)

    def library(padded, keep):
        return merged(F.scaled_dot_product_attention(*heads(padded, H), attn_mask=None if keep is None else keep[:, None, None, :]))

    functions = {"sdpa": lambda x: library(padded, None), "sdpa mask": lambda x: library(padded, keep),
                 "pad, sdpa, unpad": lambda x: _unpad(library(*_pad(x, ends, longest)), ends, x.shape[0]),
                 "varlen": lambda x: varlen(x, H, ends, longest),
                 **kernels("short_attention", device, x.dtype, lambda x: ours(x, H, ends, longest), packed=True)}
    with torch.no_grad():
        ready, refused = calls(functions, [x], [], backward=False)
        columns = timed(ready, device, min_time)
    row = {"B": B, "N": "100 +- 25, packed", "H": H, "dtype": kind, "pass": "forward", "longest": longest, "bytes": x.nbytes * 4 // 3,
           "macs": 2 * H * 64 * int((lengths.long() ** 2).sum()), **columns, "unavailable": {n: r[:160] for n, r in refused.items()}}
    return row | share_of_limit(device, row)


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a shape, dtype and direction: milliseconds, bytes that must move, MACs, and the share of the card's limit."""
    for kind in kinds(device, brief):
        yield uneven(device, kind, min_time)
        functions = candidates(device, DTYPES[kind])
        for B, N, H in shapes(device, brief):
            torch._dynamo.reset()  # one shape's graphs do not count against the next one's
            x, = cases.inputs("short_attention", Size(B, H, tokens=N), device, DTYPES[kind])[1]
            up = torch.randn(B, N, H * 64, device=device).to(DTYPES[kind])
            for backward in (False, True):
                x.requires_grad_(backward)
                with torch.set_grad_enabled(backward):
                    ready, refused = calls({n: f if isinstance(f, str) else lambda x, f=f, H=H: f(x, H) for n, f in functions.items()},
                                           [x], up, backward)
                    columns = timed(ready, device, min_time)
                moved = up.nbytes * (4 + 7 * backward)  # q, k, v, out; backward: q, k, v, dout and the three gradients
                macs = 2 * B * H * N * N * 64 * (3.5 if backward else 1)  # backward: five products of that size where the forward has two
                row = {"B": B, "N": N, "H": H, "dtype": kind, "pass": "forward+backward" if backward else "forward", "bytes": moved,
                       "macs": macs, **columns, "scores_computed": waste(N),
                       "unavailable": {n: r[:160] for n, r in refused.items()}}
                yield row | share_of_limit(device, row)


if __name__ == "__main__":
    main(rows)
