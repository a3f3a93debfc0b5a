"""Top-k of the scores, the gather of the kept rows and their LayerNorm in one launch, forward."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ceil_div, configs, layer_norm, power_of_2, select_tokens
from .add_norm import as_rows, normalised
from .policy_attention import on
from .select_tokens import others, places, sources

OP = "select_norm"


# Not specialised: what differs from schedule to schedule and picture to picture, of which each would be compiled anew.
@triton.jit(do_not_specialize=["P", "N", "K", "TILES", "score_batch"])
def select_norm_kernel(
    x, scores, weight, bias, tokens, ids, y,
    P, N, K, TILES, x_batch, x_token, score_batch, score_token, eps,
    C: tl.constexpr, WIDE: tl.constexpr, PATCHES: tl.constexpr, OTHERS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """grid (images, groups of TILES tiles of ROWS output rows); every program of an image repeats the selection."""
    b = tl.program_id(0).to(tl.int64)
    place = places(scores + b * score_batch, N, K, score_token, WIDE, PATCHES, OTHERS)
    channel = tl.arange(0, CHANNELS)
    for tile in range(tl.program_id(1) * TILES, tl.minimum((tl.program_id(1) + 1) * TILES, tl.cdiv(P + K, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        patch, token = sources(place, row, P, PATCHES)
        tl.store(ids + b * K + row - P, patch, mask=(row >= P) & (row < P + K))
        inside = (row < P + K)[:, None] & (channel < C)[None, :]
        value = tl.load(x + b * x_batch + (token * x_token)[:, None] + channel[None, :], mask=inside, other=0.0)
        out = (b * (P + K) + row.to(tl.int64))[:, None] * C + channel[None, :]
        tl.store(tokens + out, value, mask=inside)
        tl.store(y + out, normalised(value.to(tl.float32), weight, bias, channel, inside, eps, C).to(y.dtype.element_ty), mask=inside)


def default(dtype: torch.dtype, arch: int, *, C: int, B: int = 1, N: int = 197) -> dict:
    """rows: of the output, normalised at a time; tiles: of so many rows, of a program, more than one where there are programs enough;
    pairs: of scores, compared at a time. Powers of two but for tiles."""
    width = power_of_2(C)
    rows = max(1, min(8, 2048 // width))
    return {"rows": rows, "tiles": max(1, B * ceil_div(N, rows) // 1024), "pairs": 4096, "num_warps": 4 if width <= 1024 else 8}


def candidates(dtype: torch.dtype, arch: int, *, C: int, B: int = 1, N: int = 197) -> list[dict]:
    """What is worth timing, the default first."""
    first = default(dtype, arch, C=C, B=B, N=N)
    more = ({"rows": 1}, {"rows": 2}, {"rows": 8}, {"num_warps": 8}, {"pairs": 8192, "num_warps": 8}, {"tiles": 2 * first["tiles"]},
            {"tiles": 4 * first["tiles"]}, {"tiles": max(1, first["tiles"] // 2)})
    found = [first | change for change in more]
    return [first, *(c for i, c in enumerate(found) if c != first and c not in found[:i] and c["rows"] * power_of_2(C) <= 8192)]


def refuses(device: torch.device, dtype: torch.dtype, *, scores: torch.dtype = torch.float32, many: bool = False, **facts) -> str | None:
    """Why `launch` cannot serve, or None: the reasons of its two halves."""
    return layer_norm.refuses(device, dtype, **facts) or select_tokens.refuses(device, dtype, scores=scores, many=many)


def launch(x: Tensor, scores: Tensor, k: int, weight: Tensor, bias: Tensor | None, eps: float, prefix: int,
           config: dict | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`vitprune.ops.select_norm`; config: as `default` gives."""
    B, N, C = x.shape
    tokens, y = (torch.empty(B, prefix + k, C, dtype=x.dtype, device=x.device) for _ in range(2))
    ids = torch.empty(B, k, dtype=torch.int64, device=x.device)
    if tokens.numel() == 0:  # of no channels there are still ids
        return *select_tokens.launch(x, scores, k, prefix), y
    arch = configs.capability(x.device)
    config = config or configs.nearest(OP, arch, x.dtype, (("B", B), ("N", N), ("C", C))) or default(x.dtype, arch, C=C, B=B, N=N)
    x, patches = as_rows(x), power_of_2(max(N - prefix, 1))
    with on(x.device):
        select_norm_kernel[(B, ceil_div(prefix + k, config["rows"] * config["tiles"]))](
            x, scores, weight.contiguous(), bias if bias is None else bias.contiguous(), tokens, ids, y,
            prefix, N - prefix, k, config["tiles"], *x.stride()[:2], *scores.stride(), eps,
            C=C, WIDE=scores.dtype == torch.float64, PATCHES=patches, OTHERS=others(patches, config["pairs"], scores),
            ROWS=config["rows"], CHANNELS=power_of_2(C), num_warps=config["num_warps"])
    return tokens, ids, y
