"""The gradient of policy_attention to q, k, v and the policy, from the maximum and the sum that the forward pass kept of each row: keys in
one kernel, queries in another, no atomics."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .policy_attention import LOG2E, configured, dot, finite, keep_rows, on, rows_of, split


@triton.jit(do_not_specialize=["N", "H"])
def delta_kernel(out, dout, delta, N, H, o_batch, o_head, o_row, o_channel, g_batch, g_head, g_row, g_channel,
                 D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """delta [B, H, N] = the row sums of dout * out; grid (B * H * tiles of ROWS rows)."""
    b, h, first = split(tl.program_id(0), N, H, ROWS)
    row = first + tl.arange(0, ROWS)
    o = rows_of(out, b, h, row, N, o_batch, o_head, o_row, o_channel, D, WIDTH).to(tl.float32)
    g = rows_of(dout, b, h, row, N, g_batch, g_head, g_row, g_channel, D, WIDTH).to(tl.float32)
    tl.store(delta + (b * H + h) * N + row, tl.sum(o * g, 1), mask=row < N)


@triton.jit
def exponentials(s, peak, seen, EPS: tl.constexpr):
    """e from scores in units of log 2; a dropped key far above every kept one stays finite (its policy's gradient needs it)."""
    s -= peak
    if not EPS:
        s = tl.minimum(s, 80.0 * LOG2E)
    return tl.where(seen, tl.exp2(s), 0.0)


@triton.jit(do_not_specialize=["N", "H"])
def key_gradient_kernel(
    q, k, v, policy, dout, m, z, delta, dm, top, dk, dv, dpolicy, N, H, scale, eps,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel, p_batch, p_row,
    g_batch, g_head, g_row, g_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """grid (B * H * tiles of KEYS keys), each over every query; dk, dv [B, H, N, D], dpolicy [B, H, N]: a share a head."""
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
    for start in range(0, N, QUERIES):
        row = start + tl.arange(0, QUERIES)
        query = rows_of(q, b, h, row, N, q_batch, q_head, q_row, q_channel, D, WIDTH)
        up = rows_of(dout, b, h, row, N, g_batch, g_head, g_row, g_channel, D, WIDTH)
        peak = tl.load(m + head + row, mask=row < N, other=0.0)
        inverse = 1.0 / (tl.load(z + head + row, mask=row < N, other=1.0) + eps)
        shift = tl.load(delta + head + row, mask=row < N, other=0.0)
        inside = (col < N)[:, None] & (row < N)[None, :]
        s = dot(key, tl.trans(query), None) * (scale * LOG2E)
        e = exponentials(s, peak[None, :], inside, EPS)
        diagonal = col[:, None] == row[None, :]
        weighted = e * tl.where(diagonal, 1.0, kept[:, None])
        a = (weighted + tl.where(inside, eps / N, 0.0)) * inverse[None, :] if EPS else weighted * inverse[None, :]
        value_acc = dot(a.to(up.dtype), up, value_acc)
        de = (dot(value, tl.trans(up), None) - shift[None, :]) * inverse[None, :]
        policy_acc += tl.sum(tl.where(diagonal, 0.0, de * e), 1)
        ds = de * weighted
        if EPS:
            chosen = tl.load(top + head + row, mask=row < N, other=-1)
            slope = tl.load(dm + head + row, mask=row < N, other=0.0)
            ds += tl.where(col[:, None] == chosen[None, :], slope[None, :], 0.0)
        key_acc = dot(ds.to(query.dtype), query, key_acc)
    keep_rows(dk, key_acc * scale, head * D, col, N, D, D, WIDTH)
    keep_rows(dv, value_acc, head * D, col, N, D, D, WIDTH)
    tl.store(dpolicy + head + col, policy_acc, mask=col < N)


@triton.jit(do_not_specialize=["N", "H"])
def query_gradient_kernel(
    q, k, v, policy, dout, m, z, delta, dm, top, dq, N, H, scale, eps,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel, p_batch, p_row,
    g_batch, g_head, g_row, g_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """grid (B * H * tiles of QUERIES rows), each over every key; dq [B, H, N, D]; dm and top [B, H, N]: the gradient of each row's
    maximum, and the key it belongs to (-1: left out as too small)."""
    b, h, first = split(tl.program_id(0), N, H, QUERIES)
    row = first + tl.arange(0, QUERIES)
    query = rows_of(q, b, h, row, N, q_batch, q_head, q_row, q_channel, D, WIDTH)
    up = rows_of(dout, b, h, row, N, g_batch, g_head, g_row, g_channel, D, WIDTH)
    head = (b * H + h) * N
    peak = tl.load(m + head + row, mask=row < N, other=0.0)
    inverse = 1.0 / (tl.load(z + head + row, mask=row < N, other=1.0) + eps)
    shift = tl.load(delta + head + row, mask=row < N, other=0.0)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    if EPS:  # where dropped keys alone are near a row's maximum, eps is much of its sum and the maximum has a gradient, all at one key
        FELT: tl.constexpr = 2.0 ** -14 if q.dtype.element_ty.primitive_bitwidth == 16 else 2.0 ** -20
        felt = (row < N) & (eps * inverse > FELT)
        chosen = tl.full((QUERIES,), -1, tl.int32)
        slope = tl.zeros((QUERIES,), tl.float32)
        if tl.max(felt.to(tl.int32), 0) > 0:
            best = tl.full((QUERIES,), float("-inf"), tl.float32)
            mean = tl.load(z + head + row, mask=row < N, other=1.0) / N  # of a row's weights
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
                slope += tl.sum(da * (mean[:, None] - weight), 1)
            slope = tl.where(felt, eps * inverse * inverse * slope, 0.0)
            chosen = tl.where(felt, chosen, -1)
            top_key = rows_of(k, b, h, tl.where(felt, chosen, N), N, k_batch, k_head, k_row, k_channel, D, WIDTH)
            acc += slope[:, None] * top_key.to(tl.float32)
        tl.store(dm + head + row, slope, mask=row < N)
        tl.store(top + head + row, chosen, mask=row < N)
    for start in range(0, N, KEYS):
        col = start + tl.arange(0, KEYS)
        kept = tl.load(policy + b * p_batch + col.to(tl.int64) * p_row, mask=col < N, other=0.0).to(tl.float32)
        key = rows_of(k, b, h, col, N, k_batch, k_head, k_row, k_channel, D, WIDTH)
        value = rows_of(v, b, h, col, N, v_batch, v_head, v_row, v_channel, D, WIDTH)
        if not EPS:
            key, value = finite(key, kept), finite(value, kept)
        s = dot(query, tl.trans(key), None) * (scale * LOG2E)
        diagonal = row[:, None] == col[None, :]
        weighted = exponentials(s, peak[:, None], (row < N)[:, None] & (col < N)[None, :], EPS) * tl.where(diagonal, 1.0, kept[None, :])
        ds = (dot(up, tl.trans(value), None) - shift[:, None]) * inverse[:, None] * weighted
        acc = dot(ds.to(key.dtype), key, acc)
    keep_rows(dq, acc * scale, head * D, row, N, D, D, WIDTH)


def launch(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, policy: Tensor, out: Tensor, m: Tensor, z: Tensor, scale: float,
           eps: float, config: dict | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and policy."""
    B, H, N, D = q.shape
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    delta, dpolicy, dm = (torch.empty(B, H, N, dtype=torch.float32, device=q.device) for _ in range(3))
    top = torch.empty(B, H, N, dtype=torch.int32, device=q.device)
    config = config or configured(q)
    width, queries, keys = triton.next_power_of_2(D), config["backward_queries"], config["backward_keys"]
    rows = 4096 // max(width, 64)
    sizes = {"D": D, "WIDTH": width, "EPS": eps > 0, "QUERIES": queries, "KEYS": keys, "num_warps": config["backward_warps"],
             "num_stages": config["backward_stages"]}
    inputs = (q, k, v, policy, dout, m, z, delta, dm, top)
    strides = (*q.stride(), *k.stride(), *v.stride(), *policy.stride(), *dout.stride())
    with on(q.device):
        delta_kernel[(B * H * triton.cdiv(N, rows),)](out, dout, delta, N, H, *out.stride(), *dout.stride(), D=D, WIDTH=width, ROWS=rows,
                                                      num_warps=4)
        query_gradient_kernel[(B * H * triton.cdiv(N, queries),)](*inputs, dq, N, H, scale, eps, *strides, **sizes)  # writes dm and top
        key_gradient_kernel[(B * H * triton.cdiv(N, keys),)](*inputs, dk, dv, dpolicy, N, H, scale, eps, *strides, **sizes)
    return dq, dk, dv, dpolicy.sum(1).to(policy.dtype)
