"""Random cases of select_tokens, and its truth in plain Python and numpy."""
from collections import Counter

import numpy as np
import torch
from kernel_checks import layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = (0, 1, 2, 3, 7, 16, 33, 64, 65)


def case(seed: int, large: bool = False, device: str = "cpu"):
    """Arguments (x, scores, k, prefix): any size from 0, any layout, ties, NaN, infinities and both zeros."""
    rng = np.random.default_rng(seed)
    real = seed % 5 == 4 and not large  # a batch of at least four heads of 64 channels
    B = 2 if real else int(rng.choice((0, 1, 1, 2, 5)))
    N = int(rng.choice((196, 257, 1100, 2300))) if large else int(rng.integers(64, 261) if real else rng.choice(SIZES))
    B = B if real or large else min(B, 256 // max(N, 1))
    prefix, C = int(rng.integers(0, 4)), int(rng.choice((128, 192)) if real else rng.choice((0, 1, 3, 8, 48)))
    k = int(rng.choice((0, min(1, N), N, rng.integers(0, N + 1))))
    scores = rng.standard_normal((B, N))
    kind = rng.integers(0, 4)
    if kind == 1:
        scores = rng.integers(-1, 2, (B, N)) * 0.5 * rng.choice((1.0, -1.0), (B, N))  # ties, 0.0 and -0.0
    if kind == 2:
        special = rng.choice((np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 5e-324), (B, N))
        scores = np.where(rng.random((B, N)) < 0.6, special, scores)
    if kind == 3:
        scores[:] = rng.choice((np.nan, 0.0, -np.inf))
    x = torch.from_numpy(rng.standard_normal((B, prefix + N, C))).to(DTYPES[rng.integers(4)])
    scores = torch.from_numpy(scores).to(DTYPES[rng.integers(4)])
    return layout(x.to(device), rng), layout(scores.to(device), rng), k, prefix


def describe(cases) -> str:
    """How the arguments of many calls spread."""
    spread: Counter = Counter()
    for x, scores, k, _ in cases:
        N = scores.shape[1]
        spread.update((str(x.dtype), f"scores {scores.dtype}", "k=0" if k == 0 else "k=N" if k == N else "0<k<N", "cases",
                       "real" if x.shape[0] * x.shape[2] >= 256 and 64 <= N <= 260 else "N<64" if N < 64 else "N>=64"))
    return str(dict(sorted(spread.items())))


def truth(x, scores, k: int, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (as float64) and ids by Python's sort: higher first, lower index first, NaN last."""
    x, scores = x.double().cpu().numpy(), scores.double().cpu().numpy()
    tokens, ids = np.zeros((x.shape[0], prefix + k, x.shape[2])), np.zeros((x.shape[0], k), np.int64)
    for b, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda i: (np.isnan(row[i]), 0.0 if np.isnan(row[i]) else -row[i], i))
        ids[b] = sorted(order[:k])
        tokens[b] = np.concatenate([x[b, :prefix], x[b, prefix + ids[b]]])
    return tokens, ids


def check(run, seed: int, **options) -> None:
    """run(x, scores, k, prefix) equals the truth, exactly, on the case of that seed."""
    arguments = case(seed, **options)
    tokens, ids = run(*arguments)
    expected_tokens, expected_ids = truth(*arguments)
    assert tokens.dtype == arguments[0].dtype, seed
    assert ids.dtype == torch.int64, seed
    np.testing.assert_array_equal(ids.cpu().numpy(), expected_ids, err_msg=f"ids, seed {seed}")
    np.testing.assert_array_equal(tokens.double().cpu().numpy(), expected_tokens, err_msg=f"tokens, seed {seed}")
