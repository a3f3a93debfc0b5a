"""Kept tokens to packed rows and back, one launch each: every token finds its own row."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ceil_div, configs, power_of_2
from .policy_attention import on

OP, INVERSE = "compact_tokens", "expand_rows"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["T", "N", "capacity"])
def compact_tokens_kernel(
    x, keep, rows, cu_seqlens,
    T, N, C, capacity, chunk,
    x_batch, x_token, x_channel,
    SCAN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """grid (chunks of tokens); T = B * N. A kept token goes to row `kept before it`, a dropped one is a row of zeros counted from
    the end: so every row up to T is written once, and nobody needs to know how many are kept."""
    first = tl.program_id(0) * chunk
    counts = tl.zeros((SCAN,), tl.int32)
    for start in range(0, tl.minimum(first, T), SCAN):
        token = start + tl.arange(0, SCAN)
        counts += tl.load(keep + token, mask=(token < first) & (token < T), other=0).to(tl.int32)
    before = tl.sum(counts, 0)
    tl.store(cu_seqlens, 0, mask=first == 0)
    for start in range(first, first + chunk, ROWS):
        token = start + tl.arange(0, ROWS)
        real = token < T
        kept = tl.load(keep + token, mask=real, other=0).to(tl.int32)
        upto = before + tl.cumsum(kept, 0)
        tl.store(cu_seqlens + (token + 1) // N, upto, mask=real & ((token + 1) % N == 0))
        row = tl.where(kept != 0, upto - 1, T - 1 - (token - upto))
        row = tl.where(real, row, token).to(tl.int64)  # past T: rows that only a larger capacity has
        source = x + (token // N).to(tl.int64) * x_batch + (token % N).to(tl.int64) * x_token
        for c in range(0, C, CHANNELS):
            channel = c + tl.arange(0, CHANNELS).to(tl.int64)
            lane = (channel < C)[None, :]
            value = tl.load(source[:, None] + (channel * x_channel)[None, :], mask=(kept != 0)[:, None] & lane, other=0)
            tl.store(rows + row[:, None] * C + channel[None, :], value, mask=(row < capacity)[:, None] & lane)
        before += tl.sum(kept, 0)


@triton.jit(do_not_specialize=["N", "capacity", "fill"])
def expand_rows_kernel(
    rows, cu_seqlens, keep, out,
    N, C, capacity, fill,
    rows_row, rows_channel, cu_stride,
    SCAN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """grid (images, tiles of ROWS tokens); rows that are not there read as zero."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    counts = tl.zeros((SCAN,), tl.int32)
    for start in range(0, first, SCAN):
        token = start + tl.arange(0, SCAN)
        counts += tl.load(keep + b * N + token, mask=token < first, other=0).to(tl.int32)
    token = first + tl.arange(0, ROWS)
    kept = tl.load(keep + b * N + token, mask=token < N, other=0).to(tl.int32)
    row = tl.load(cu_seqlens + b * cu_stride).to(tl.int64) + tl.sum(counts, 0) + tl.cumsum(kept, 0) - 1
    there = (kept != 0) & (row >= 0) & (row < capacity)
    for c in range(0, C, CHANNELS):
        channel = c + tl.arange(0, CHANNELS).to(tl.int64)
        lane = (channel < C)[None, :]
        value = tl.load(rows + (row * rows_row)[:, None] + (channel * rows_channel)[None, :], mask=there[:, None] & lane, other=0)
        value = tl.where((kept != 0)[:, None], value, fill.to(value.dtype))
        tl.store(out + (b * N + token)[:, None] * C + channel[None, :], value, mask=(token < N)[:, None] & lane)


def default(dtype: torch.dtype, arch: int, *, B: int = 1, N: int = 197, C: int = 384) -> dict:
    """rows, channels: tokens and channels copied at a time; scan: mask entries counted at a time; programs: at most so many, since
    each counts the mask before its own tokens."""
    return {"rows": 16, "channels": min(256, max(16, power_of_2(C))), "scan": 4096, "programs": 1024, "num_warps": 4}


def candidates(dtype: torch.dtype, arch: int, *, B: int = 1, N: int = 197, C: int = 384) -> list[dict]:
    """What is worth timing, the default first."""
    first = default(dtype, arch, B=B, N=N, C=C)
    found = [first | change for change in ({"rows": 4}, {"rows": 8}, {"rows": 8, "channels": 512}, {"channels": 128}, {"num_warps": 8},
                                           {"programs": 512}, {"programs": 2048}, {"scan": 8192, "num_warps": 8}, {"scan": 1024})]
    return [first, *(c for c in found if c != first)]


def refuses(device: torch.device, dtype: torch.dtype, **_) -> str | None:
    """Why no launch can serve, or None; dtype: of the rows, whose bits are copied as they are."""
    return None if dtype.itemsize in BITS else f"no kernel for {dtype}"


def _config(op: str, t: Tensor, B: int, N: int, C: int) -> dict:
    arch = configs.capability(t.device)
    return configs.nearest(op, arch, t.dtype, (("B", B), ("N", N), ("C", C))) or default(t.dtype, arch, B=B, N=N, C=C)


def launch(x: Tensor, keep: Tensor, capacity: int, config: dict | None = None) -> tuple[Tensor, Tensor]:
    """`vitprune.ops.compact_tokens`."""
    B, N, C = x.shape
    if B * N == 0:
        return x.new_zeros(capacity, C), torch.zeros(B + 1, dtype=torch.int32, device=x.device)
    rows, cu_seqlens = x.new_empty(capacity, C), torch.empty(B + 1, dtype=torch.int32, device=x.device)
    config = config or _config(OP, x, B, N, C)
    keep = keep.contiguous()  # a byte a token
    tokens = max(B * N, capacity)
    chunk = 16 * ceil_div(tokens, 16 * config["programs"])  # a multiple of 16 lets the mask be read 16 bytes at a time
    bits = BITS[x.element_size()]
    with on(x.device):
        compact_tokens_kernel[(ceil_div(tokens, chunk),)](
            x.view(bits), keep.view(torch.uint8), rows.view(bits), cu_seqlens, B * N, N, C, capacity, chunk, *x.stride(),
            SCAN=config["scan"], ROWS=config["rows"], CHANNELS=config["channels"], num_warps=config["num_warps"])
    if capacity < B * N:  # elsewhere there is room for everything
        torch._assert_async(cu_seqlens[-1] <= capacity, f"compact_tokens: more tokens kept than capacity {capacity}")
    return rows, cu_seqlens


def launch_expand(rows: Tensor, cu_seqlens: Tensor, keep: Tensor, fill: float, config: dict | None = None) -> Tensor:
    """`vitprune.ops.expand_rows`."""
    (B, N), (R, C) = keep.shape, rows.shape
    out = rows.new_empty(B, N, C)
    if out.numel() == 0:
        return out
    config = config or _config(INVERSE, rows, B, N, C)
    bits = BITS[rows.element_size()]
    with on(rows.device):
        expand_rows_kernel[(B, ceil_div(N, config["rows"]))](
            rows.view(bits), cu_seqlens, keep.contiguous().view(torch.uint8), out.view(bits), N, C, R,
            torch.tensor(fill, dtype=rows.dtype, device="cpu").view(bits).item(), *rows.stride(), cu_seqlens.stride(0),
            SCAN=min(config["scan"], max(16, power_of_2(N))), ROWS=config["rows"], CHANNELS=config["channels"],
            num_warps=config["num_warps"])
    return out
