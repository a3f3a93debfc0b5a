"""Top-k of the scores and the gather of the kept rows in one launch."""
import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ceil_div, configs, power_of_2

OP = "select_tokens"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _order_keys(scores, WIDE: tl.constexpr):
    """Scores as integers in the same order: NaN the least, -0.0 equal to +0.0."""
    if WIDE:
        bits = scores.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
        keys = tl.where(magnitude > 0x7FF0000000000000, -0x7FFFFFFFFFFFFFFF, tl.where(bits < 0, -magnitude, magnitude))
    else:
        bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        keys = tl.where(magnitude > 0x7F800000, -0x7FFFFFFF, tl.where(bits < 0, -magnitude, magnitude))
    return keys


@triton.jit
def places(scores, N, K, score_token, WIDE: tl.constexpr, PATCHES: tl.constexpr, OTHERS: tl.constexpr):
    """Where each patch of the image with these scores goes among the K that are kept; -1 for the others."""
    patch = tl.arange(0, PATCHES)
    score = tl.load(scores + patch.to(tl.int64) * score_token, mask=patch < N, other=0.0)
    key = _order_keys(score, WIDE)[:, None]
    ahead = tl.zeros((PATCHES, OTHERS), tl.int32)  # how many patches go before this one; summed up once, since sums cost more than they do
    for start in range(0, N, OTHERS):
        other = start + tl.arange(0, OTHERS)
        other_score = tl.load(scores + other.to(tl.int64) * score_token, mask=other < N, other=0.0)
        other_key = _order_keys(other_score, WIDE)[None, :]
        before = (other_key > key) | ((other_key == key) & (other[None, :] < patch[:, None]))
        ahead += (before & (other < N)[None, :]).to(tl.int32)
    kept = (tl.sum(ahead, 1) < K) & (patch < N)
    return tl.where(kept, tl.cumsum(kept.to(tl.int32), 0) - 1, -1)


@triton.jit
def sources(place, row, P, PATCHES: tl.constexpr):
    """The patch that each output row holds, int64, where it is no prefix token; its row in x."""
    here = place[None, :] == row[:, None] - P
    found = tl.sum(tl.where(here, tl.arange(0, PATCHES)[None, :], 0), 1).to(tl.int64)
    return found, tl.where(row < P, row, P + found)


# Not specialised: what differs from schedule to schedule and picture to picture, of which each would be compiled anew.
@triton.jit(do_not_specialize=["P", "N", "K", "score_batch"])
def select_tokens_kernel(
    x, scores, tokens, ids,
    P, N, K, C,
    x_batch, x_token, x_channel, score_batch, score_token,
    WIDE: tl.constexpr, PATCHES: tl.constexpr, OTHERS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """grid (images, tiles of ROWS output rows); every program of an image repeats the cheap selection."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    patch, token = sources(places(scores + b * score_batch, N, K, score_token, WIDE, PATCHES, OTHERS), row, P, PATCHES)
    tl.store(ids + b * K + row - P, patch, mask=(row >= P) & (row < P + K))

    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS).to(tl.int64)
        mask = (row < P + K)[:, None] & (channel < C)[None, :]
        value = tl.load(x + b * x_batch + (token * x_token)[:, None] + (channel * x_channel)[None, :], mask=mask)
        out = tokens + (b * (P + K) + row.to(tl.int64))[:, None] * C + channel[None, :]
        tl.store(out, value, mask=mask)


@triton.jit(do_not_specialize=["P", "N", "K"])
def select_tokens_backward_kernel(
    dtokens, ids, dx,
    P, N, K, C,
    d_batch, d_token, d_channel,
    OTHERS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """grid (images, tiles of ROWS rows of dx); ids ascend, so a kept patch's row is the number of ids below it."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    below = tl.zeros((ROWS,), tl.int32)
    kept = (row < P).to(tl.int32)
    for start in range(0, K, OTHERS):
        other = start + tl.arange(0, OTHERS)
        at = tl.load(ids + b * K + other, mask=other < K, other=N).to(tl.int32)[None, :]
        below += tl.sum((at < row[:, None] - P).to(tl.int32), 1)
        kept += tl.sum((at == row[:, None] - P).to(tl.int32), 1)
    source = tl.where(row < P, row, P + below).to(tl.int64)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS).to(tl.int64)
        mask = (row < P + N)[:, None] & (channel < C)[None, :]
        value = tl.load(dtokens + b * d_batch + (source * d_token)[:, None] + (channel * d_channel)[None, :],
                        mask=mask & (kept != 0)[:, None], other=0)
        tl.store(dx + (b * (P + N) + row.to(tl.int64))[:, None] * C + channel[None, :], value, mask=mask)


def default(dtype: torch.dtype, arch: int, **shape: int) -> dict:
    """rows, channels: of the output, copied by a program at a time; pairs: of scores, compared at a time. Powers of two."""
    return {"rows": 8, "channels": 256, "pairs": 4096, "num_warps": 4}


def candidates(dtype: torch.dtype, arch: int, **shape: int) -> list[dict]:
    """What is worth timing, the default first."""
    first = default(dtype, arch, **shape)
    return [first, *(first | change for change in ({"rows": 4}, {"rows": 16}, {"rows": 32}, {"rows": 16, "channels": 512, "num_warps": 8},
                                                   {"channels": 128}, {"pairs": 2048}, {"pairs": 8192, "num_warps": 8}))]


def _config(t: Tensor, B: int, N: int, C: int) -> dict:
    arch = configs.capability(t.device)
    return configs.nearest(OP, arch, t.dtype, (("B", B), ("N", N), ("C", C))) or default(t.dtype, arch)


def refuses(device: torch.device, dtype: torch.dtype, *, scores: torch.dtype = torch.float32, many: bool = False,
            **_) -> str | None:
    """Why `launch` cannot serve, or None. dtype: of x, any; scores: the dtype of the scores; many: whether N > 4096."""
    if scores not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"no kernel for scores of {scores}"
    if many:
        return "more than the 4,096 patches whose scores a program can hold"
    return None


def others(patches: int, pairs: int, scores: Tensor) -> int:
    """How many scores a program compares with all `patches` at a time; 64-bit keys take two registers each."""
    return max(1, min(patches, pairs * 4 // max(4, scores.element_size()) // patches))


def launch(x: Tensor, scores: Tensor, k: int, prefix: int, config: dict | None = None) -> tuple[Tensor, Tensor]:
    """`vitprune.ops.select_tokens`; config: as `default` gives."""
    B, N, C = x.shape
    config = config or _config(x, B, N, C)
    tokens = torch.empty(B, prefix + k, C, dtype=x.dtype, device=x.device)
    ids = torch.empty(B, k, dtype=torch.int64, device=x.device)
    if B == 0 or prefix + k == 0:
        return tokens, ids
    bits = BITS[x.element_size()]  # rows are copied as they are, whatever their format
    patches = power_of_2(max(N - prefix, 1))
    grid = (B, ceil_div(prefix + k, config["rows"]))
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        select_tokens_kernel[grid](
            x.view(bits), scores, tokens.view(bits), ids,
            prefix, N - prefix, k, C, *x.stride(), *scores.stride(),
            WIDE=scores.dtype == torch.float64, PATCHES=patches, OTHERS=others(patches, config["pairs"], scores),
            ROWS=config["rows"], CHANNELS=config["channels"], num_warps=config["num_warps"])
    return tokens, ids


def launch_backward(dtokens: Tensor, ids: Tensor, prefix: int, tokens: int, config: dict | None = None) -> Tensor:
    """The gradient of x [B, tokens, C], zeros included, from that of the kept tokens [B, P+K, C] and their ids."""
    B, _, C = dtokens.shape
    config = config or _config(dtokens, B, tokens, C)
    dx = torch.empty(B, tokens, C, dtype=dtokens.dtype, device=dtokens.device)
    if dx.numel() == 0:
        return dx
    bits = BITS[dx.element_size()]
    with torch.cuda.device(dx.device) if dx.is_cuda else contextlib.nullcontext():
        select_tokens_backward_kernel[(B, ceil_div(tokens, config["rows"]))](
            dtokens.view(bits), ids.contiguous(), dx.view(bits), prefix, tokens - prefix, ids.shape[1], C, *dtokens.stride(),
            OTHERS=256, ROWS=config["rows"], CHANNELS=config["channels"], num_warps=config["num_warps"])
    return dx
