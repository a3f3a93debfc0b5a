"""`vitprune.ops.select_tokens` in C++ and in CUDA C++."""
import torch
from torch import Tensor

from .. import native
from . import TYPES, _native

OP = "select_tokens"
LIMIT = 2 ** 31 - 1
MAX_ROWS = 256  # of csrc/cuda/select_tokens.cu


def refuses_cpp(device: torch.device, dtype: torch.dtype, *, scores: torch.dtype = torch.float32, **_) -> str | None:
    """Why `cpp` cannot serve, or None. dtype: of x, any; scores: the dtype of the scores."""
    return native.reason_cpp(device) or _refuses_scores(scores)


def refuses_cuda(device: torch.device, dtype: torch.dtype, *, scores: torch.dtype = torch.float32, **_) -> str | None:
    """Why `cuda` cannot serve, or None. dtype: of x, any; scores: the dtype of the scores."""
    return native.reason_cuda(device, OP) or _refuses_scores(scores)


def _refuses_scores(dtype: torch.dtype) -> str | None:
    return None if dtype in TYPES else f"no kernel for scores of {dtype}"


def cpp(x: Tensor, scores: Tensor, k: int, prefix: int) -> tuple[Tensor, Tensor]:
    """On the CPU, with as many threads as torch uses."""
    native.require(OP, refuses_cpp(x.device, x.dtype, scores=scores.dtype) is None, x, scores)
    tokens, ids, params = _prepare(x, scores, k, prefix)
    if params is not None:
        _native.select_tokens_cpu(params, torch.get_num_threads())
    return tokens, ids


def cuda(x: Tensor, scores: Tensor, k: int, prefix: int) -> tuple[Tensor, Tensor]:
    """One launch on the current stream of x's device."""
    B, rows, patches = x.shape[0], prefix + k, scores.shape[1]
    threads = 256 if patches <= 256 else 1024
    # Two blocks for each multiprocessor, and at least a row for each of a block's warps.
    tiles = max(1, 2 * native.processors(x.device.index) // max(B, 1))
    tile = min(MAX_ROWS, max(-(-rows // tiles), threads // 32))
    tokens, ids, params = _prepare(x, scores, k, prefix, tile)
    if params is not None:
        native.launch(OP, OP, (B, -(-rows // tile)), threads, params, x.device)
    return tokens, ids


def _prepare(x: Tensor, scores: Tensor, k: int, prefix: int, rows: int = 0):
    """Outputs and kernel parameters; None for parameters where there is nothing to write."""
    B, N, C = x.shape
    fits = scores.shape == (B, N - prefix) and 0 <= k <= N - prefix and scores.dtype in TYPES and scores.device == x.device
    native.require(OP, fits, x, scores)
    tokens = torch.empty(B, prefix + k, C, dtype=x.dtype, device=x.device)
    ids = torch.empty(B, k, dtype=torch.int64, device=x.device)
    if B == 0 or prefix + k == 0:
        return tokens, ids, None
    if max(B, N) > LIMIT:
        raise ValueError(f"select_tokens: B and P+N must be at most {LIMIT}, got {B} and {N}")
    size = x.element_size()
    batch, token, channel = (s * size for s in x.stride())
    unit = size
    if channel == size:  # rows are contiguous: copy the widest unit that every row's start and length allow
        bits = x.data_ptr() | tokens.data_ptr() | batch | token | C * size | 16
        unit = channel = bits & -bits
    strides = (batch, token, channel, *(s * scores.element_size() for s in scores.stride()))
    params = _native.SelectTokensParams(x.data_ptr(), scores.data_ptr(), tokens.data_ptr(), ids.data_ptr(),
                                        (B, prefix, N - prefix, k), strides, C * size // unit, unit,
                                        TYPES[scores.dtype], rows)
    return tokens, ids, params
