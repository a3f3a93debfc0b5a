"""The gradient of policy_attention to q, k, v and the policy, from the maximum and the sum that the forward pass kept of each row: keys in
one kernel, queries in another, no atomics."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ceil_div, power_of_2
from .policy_attention import LOG2E, configured, dot, felt, finite, in_float, keep_rows, on, rounded_product, rows_of, split, tail


@triton.jit
def exponentials(s, peak, EPS: tl.constexpr):
    """e from scores in units of log 2; a dropped key far above every kept one stays finite (its policy's gradient needs it)."""
    s -= peak
    if not EPS:
        s = tl.minimum(s, 80.0 * LOG2E)
    return tl.exp2(s)


@triton.jit
def add_key_gradients(
    key, value, kept, q, dout, m, z, delta, dm, top, key_acc, value_acc, policy_acc, b, h, col, start, N, H, scale, eps, some,
    q_batch, q_head, q_row, q_channel, g_batch, g_head, g_row, g_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr,
):
    """A step of `key_gradient_kernel`: SIZE queries from `start` on. Past the last all is zero, and adds nothing."""
    row = start + tl.arange(0, SIZE)
    head = (b * H + h) * N
    query = rows_of(q, b, h, row, N, q_batch, q_head, q_row, q_channel, D, WIDTH)
    up = rows_of(dout, b, h, row, N, g_batch, g_head, g_row, g_channel, D, WIDTH)
    peak = tl.load(m + head + row, mask=row < N, other=0.0)
    inverse = 1.0 / (tl.load(z + head + row, mask=row < N, other=1.0) + eps)
    shift = tl.load(delta + head + row, mask=row < N, other=0.0)
    e = exponentials(dot(key, tl.trans(query), None) * (scale * LOG2E), peak[None, :], EPS)
    weighted = e * kept[:, None]
    a = (weighted + eps / N) * inverse[None, :] if EPS else weighted * inverse[None, :]
    value_acc = dot(a.to(up.dtype), up, value_acc)
    de = (dot(value, tl.trans(up), None) - shift[None, :]) * inverse[None, :]
    if up.dtype == tl.float32:  # where a sum less a term would show
        policy_acc += tl.sum(tl.where(col[:, None] == row[None, :], 0.0, de * e), 1)
    else:
        policy_acc += tl.sum(de * e, 1)
    ds = de * weighted
    if EPS:
        if some > 0:
            chosen = tl.load(top + head + row, mask=row < N, other=-1)
            slope = tl.load(dm + head + row, mask=row < N, other=0.0)
            ds += tl.where(col[:, None] == chosen[None, :], slope[None, :], 0.0)
    return dot(ds.to(query.dtype), query, key_acc), value_acc, policy_acc


@triton.jit(do_not_specialize=["N", "H", "marks"])
def key_gradient_kernel(
    q, k, v, policy, dout, m, z, delta, dm, top, any_felt, dqkv, dpolicy, N, H, marks, scale, eps,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel, p_batch, p_row,
    g_batch, g_head, g_row, g_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):
    """grid (B * H * tiles of KEYS keys), each over every query; dqkv [B, N, 3, H, D], of which it writes k's and v's; dpolicy
    [B, H, N]: a share a head."""
    b, h, first = split(tl.program_id(0), N, H, KEYS)
    col = first + tl.arange(0, KEYS)
    kept = tl.load(policy + b * p_batch + col.to(tl.int64) * p_row, mask=col < N, other=0.0).to(tl.float32)
    key = rows_of(k, b, h, col, N, k_batch, k_head, k_row, k_channel, D, WIDTH)
    value = rows_of(v, b, h, col, N, v_batch, v_head, v_row, v_channel, D, WIDTH)
    if not EPS:
        key, value = finite(key, kept), finite(value, kept)
    key_acc = tl.zeros((KEYS, WIDTH), tl.float32)
    value_acc = tl.zeros((KEYS, WIDTH), tl.float32)
    policy_acc = tl.zeros((KEYS,), tl.float32)
    head = (b * H + h) * N
    some = 0
    if EPS:
        for i in range(0, marks):
            some += tl.load(any_felt + (b * H + h) * marks + i)
    full = N // QUERIES * QUERIES
    for start in range(0, full, QUERIES):
        key_acc, value_acc, policy_acc = add_key_gradients(
            key, value, kept, q, dout, m, z, delta, dm, top, key_acc, value_acc, policy_acc, b, h, col, start, N, H, scale, eps, some,
            q_batch, q_head, q_row, q_channel, g_batch, g_head, g_row, g_channel, D, WIDTH, EPS, QUERIES)
    for start in tl.range(full, N, TAIL, num_stages=1):  # once at most; straight-line code spills
        key_acc, value_acc, policy_acc = add_key_gradients(
            key, value, kept, q, dout, m, z, delta, dm, top, key_acc, value_acc, policy_acc, b, h, col, start, N, H, scale, eps, some,
            q_batch, q_head, q_row, q_channel, g_batch, g_head, g_row, g_channel, D, WIDTH, EPS, TAIL)
    query = rows_of(q, b, h, col, N, q_batch, q_head, q_row, q_channel, D, WIDTH).to(tl.float32)  # a token sees itself whole
    up = rows_of(dout, b, h, col, N, g_batch, g_head, g_row, g_channel, D, WIDTH).to(tl.float32)
    inverse = 1.0 / (tl.load(z + head + col, mask=col < N, other=1.0) + eps)
    peak = tl.load(m + head + col, mask=col < N, other=0.0)
    e = exponentials(tl.sum(rounded_product(query, key.to(tl.float32)), 1) * (scale * LOG2E), peak, EPS)
    de = (tl.sum(rounded_product(up, value.to(tl.float32)), 1) - tl.load(delta + head + col, mask=col < N, other=0.0)) * inverse
    if dout.dtype.element_ty != tl.float32:
        policy_acc -= de * e
    missing = e * (1.0 - kept)
    key_acc += (de * missing)[:, None] * query
    value_acc += (missing * inverse)[:, None] * up
    keep_rows(dqkv, key_acc * scale, (3 * b * N + 1) * H * D + h * D, col, N, 3 * H * D, D, WIDTH)
    keep_rows(dqkv, value_acc, (3 * b * N + 2) * H * D + h * D, col, N, 3 * H * D, D, WIDTH)
    tl.store(dpolicy + head + col, policy_acc, mask=col < N)


@triton.jit
def add_query_gradients(
    query, up, k, v, policy, peak, inverse, shift, acc, b, h, start, N, scale,
    k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel, p_batch, p_row,
    D: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr, LAST: tl.constexpr,
):
    """A step of `query_gradient_kernel`: SIZE keys from `start` on, of which some may lie past the LAST."""
    col = start + tl.arange(0, SIZE)
    kept = tl.load(policy + b * p_batch + col.to(tl.int64) * p_row, mask=col < N, other=0.0).to(tl.float32)
    key = rows_of(k, b, h, col, N, k_batch, k_head, k_row, k_channel, D, WIDTH)
    value = rows_of(v, b, h, col, N, v_batch, v_head, v_row, v_channel, D, WIDTH)
    if not EPS:
        key, value = finite(key, kept), finite(value, kept)
    e = exponentials(dot(query, tl.trans(key), None) * (scale * LOG2E), peak[:, None], EPS) * kept[None, :]
    if LAST:
        e = tl.where((col < N)[None, :], e, 0.0)
    ds = (dot(up, tl.trans(value), None) - shift[:, None]) * inverse[:, None] * e
    return dot(ds.to(key.dtype), key, acc)


@triton.jit(do_not_specialize=["N", "H"])
def query_gradient_kernel(
    q, k, v, policy, dout, out, m, z, delta, dm, top, any_felt, dqkv, N, H, scale, eps,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel, p_batch, p_row,
    g_batch, g_head, g_row, g_channel, o_batch, o_head, o_row, o_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):
    """grid (B * H * tiles of QUERIES rows), each over every key; dqkv [B, N, 3, H, D], of which it writes q's; delta [B, H, N], the row
    sums of dout * out; dm and top [B, H, N], the gradient of each row's maximum and the key it belongs to (-1: left out as too small);
    any_felt, one a tile: whether any is not."""
    b, h, first = split(tl.program_id(0), N, H, QUERIES)
    row = first + tl.arange(0, QUERIES)
    query = rows_of(q, b, h, row, N, q_batch, q_head, q_row, q_channel, D, WIDTH)
    up = rows_of(dout, b, h, row, N, g_batch, g_head, g_row, g_channel, D, WIDTH)
    result = rows_of(out, b, h, row, N, o_batch, o_head, o_row, o_channel, D, WIDTH)
    head = (b * H + h) * N
    peak = tl.load(m + head + row, mask=row < N, other=0.0)
    total = tl.load(z + head + row, mask=row < N, other=1.0)
    inverse = 1.0 / (total + eps)
    shift = tl.sum(rounded_product(up.to(tl.float32), result.to(tl.float32)), 1)
    tl.store(delta + head + row, shift, mask=row < N)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    if EPS:  # where dropped keys alone are near a row's maximum, eps is much of its sum and the maximum has a gradient, all at one key
        much = (row < N) & felt(total, eps, query.dtype == tl.float32)
        some = tl.max(much.to(tl.int32), 0)
        tl.store(any_felt + tl.program_id(0), some)
        chosen = tl.full((QUERIES,), -1, tl.int32)
        slope = tl.zeros((QUERIES,), tl.float32)
        if some > 0:
            best = tl.full((QUERIES,), float("-inf"), tl.float32)
            mean = total / N  # of a row's weights
            for start in range(0, N, KEYS):
                col = start + tl.arange(0, KEYS)
                kept = tl.load(policy + b * p_batch + col.to(tl.int64) * p_row, mask=col < N, other=0.0).to(tl.float32)
                key = rows_of(k, b, h, col, N, k_batch, k_head, k_row, k_channel, D, WIDTH)
                value = rows_of(v, b, h, col, N, v_batch, v_head, v_row, v_channel, D, WIDTH)
                s = tl.where((col < N)[None, :], dot(query, tl.trans(key), None) * (scale * LOG2E), float("-inf"))
                da = dot(up, tl.trans(value), None)
                weight = tl.exp2(s - peak[:, None]) * tl.where(row[:, None] == col[None, :], 1.0, kept[None, :])
                highest = tl.max(s, 1)
                chosen = tl.where(highest > best, start + tl.argmax(s, 1), chosen)
                best = tl.maximum(best, highest)
                slope += tl.sum(rounded_product(da, mean[:, None] - weight), 1)
            slope = tl.where(much, eps * inverse * inverse * slope, 0.0)
            chosen = tl.where(much, chosen, -1)
            top_key = rows_of(k, b, h, tl.where(much, chosen, N), N, k_batch, k_head, k_row, k_channel, D, WIDTH)
            acc += slope[:, None] * top_key.to(tl.float32)
        tl.store(dm + head + row, slope, mask=row < N)
        tl.store(top + head + row, chosen, mask=row < N)
    full = N // KEYS * KEYS
    for start in range(0, full, KEYS):
        acc = add_query_gradients(
            query, up, k, v, policy, peak, inverse, shift, acc, b, h, start, N, scale, k_batch, k_head, k_row, k_channel,
            v_batch, v_head, v_row, v_channel, p_batch, p_row, D, WIDTH, EPS, KEYS, False)
    for start in tl.range(full, N, TAIL, num_stages=1):  # once at most; straight-line code spills
        acc = add_query_gradients(
            query, up, k, v, policy, peak, inverse, shift, acc, b, h, start, N, scale, k_batch, k_head, k_row, k_channel,
            v_batch, v_head, v_row, v_channel, p_batch, p_row, D, WIDTH, EPS, TAIL, True)
    kept = tl.load(policy + b * p_batch + row.to(tl.int64) * p_row, mask=row < N, other=1.0).to(tl.float32)
    key = rows_of(k, b, h, row, N, k_batch, k_head, k_row, k_channel, D, WIDTH)  # a token sees itself whole
    value = rows_of(v, b, h, row, N, v_batch, v_head, v_row, v_channel, D, WIDTH)
    if not EPS:
        key, value = finite(key, kept), finite(value, kept)
    e = exponentials(tl.sum(rounded_product(query.to(tl.float32), key.to(tl.float32)), 1) * (scale * LOG2E), peak, EPS)
    de = (tl.sum(rounded_product(up.to(tl.float32), value.to(tl.float32)), 1) - shift) * inverse
    acc += (de * e * (1.0 - kept))[:, None] * key.to(tl.float32)
    keep_rows(dqkv, acc * scale, 3 * b * N * H * D + h * D, row, N, 3 * H * D, D, WIDTH)


def launch(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, policy: Tensor, out: Tensor, m: Tensor, z: Tensor, scale: float,
           eps: float, config: dict | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of q, k and v [B, N, 3, H, D], and of policy."""
    if in_float(q):
        dqkv, dpolicy = launch(dout.float(), q.float(), k.float(), v.float(), policy, out.float(), m, z, scale, eps, config)
        return dqkv.to(q.dtype), dpolicy
    B, H, N, D = q.shape
    dqkv = torch.empty(B, N, 3, H, D, dtype=q.dtype, device=q.device)
    delta, dpolicy, dm = (torch.empty(B, H, N, dtype=torch.float32, device=q.device) for _ in range(3))
    top = torch.empty(B, H, N, dtype=torch.int32, device=q.device)
    config = config or configured(q)
    marks = ceil_div(N, config["dq_queries"])
    any_felt = torch.empty(B * H * marks, dtype=torch.int32, device=q.device)
    strides = (*q.stride(), *k.stride(), *v.stride(), *policy.stride(), *dout.stride())

    def constants(at: str, passing: str) -> dict:
        return {"D": D, "WIDTH": power_of_2(D), "EPS": eps > 0, "QUERIES": config[at + "queries"], "KEYS": config[at + "keys"],
                "TAIL": tail(N, config[at + passing]), "num_warps": config[at + "num_warps"], "num_stages": config[at + "num_stages"]}
    with on(q.device):
        query_gradient_kernel[(B * H * marks,)](q, k, v, policy, dout, out, m, z, delta, dm, top, any_felt, dqkv, N, H, scale, eps,
                                                *strides, *out.stride(), **constants("dq_", "keys"))
        key_gradient_kernel[(B * H * ceil_div(N, config["dk_keys"]),)](  # reads what the first has written
            q, k, v, policy, dout, m, z, delta, dm, top, any_felt, dqkv, dpolicy, N, H, marks, scale, eps, *strides,
            **constants("dk_", "queries"))
    return dqkv, dpolicy.sum(1).to(policy.dtype)
