"""A launch of every kernel, forward and backward, for B images of N tokens of DeiT-S in float16; to be recorded, on any device."""
import torch


def half(*shape, dtype=torch.float16):
    return torch.empty(*shape, dtype=dtype)


def policy(forward, backward, B, N):
    q, k, v = half(B, N, 3, 6, 64).permute(2, 0, 3, 1, 4).unbind(0)
    rows = torch.empty(B, 6, N)
    forward.launch(q, k, v, half(B, N), 0.125, 1e-6)
    backward.launch(q, q, k, v, half(B, N), q, rows, rows, 0.125, 1e-6)


def sliced(linear, mlp, B, N):
    x, square, w1, live = half(B, N, 384), half(384, 384), half(1536, 384), half(3, dtype=torch.int32)
    linear.launch(x, square, None, live, "out", 64)
    linear.launch_backward(half(B, N, 192), x, square, live, "out", 64)
    mlp.launch(x, w1, half(1536), w1.t(), half(384), live, x, 64)
    mlp.launch_backward(x, x, w1, half(1536), w1.t(), live, 64)


def short(forward, backward, B, N):
    qkv, ends = half(B, N, 3 * 384), half(B + 1, dtype=torch.int32)
    for x, cu_seqlens in ((qkv, None), (qkv.flatten(0, 1), ends)):
        forward.launch(x, 6, cu_seqlens, N, 0.125)
        backward.launch(x[..., :384], x, 6, cu_seqlens, N, 0.125)


def select(module, B, N):
    for k in (N // 3, int(0.7 * N)):
        module.launch(half(B, N, 384), half(B, N - 1), k, 1)
        module.launch_backward(half(B, k + 1, 384), half(B, k, dtype=torch.int64), 1, N)


def select_norm(module, B, N):
    for k in (N // 3, int(0.7 * N)):
        module.launch(half(B, N, 384), half(B, N - 1), k, half(384), half(384), 1e-6, 1)


def compact(module, B, N):
    keep = half(B, N, dtype=torch.bool)
    module.launch(half(B, N, 384), keep, B * N)
    module.launch_expand(half(B * N, 384), half(B + 1, dtype=torch.int32), keep, 0.0)


def norm(add_norm, layer_norm, B, N):
    x, w = half(B, N, 384), half(384)
    add_norm.launch(x, x, w, w, None, 1e-6)
    add_norm.launch_backward(x, x, x, x, w, None, 1e-6)
    layer_norm.launch(x, w, w, 1e-6)


def score(module, B, N):
    C, w = 384, half
    module.launch(half(B, N, C), w(C), w(C), 1e-6, w(C, C), w(C), w(C // 2, C), w(C // 2), w(C // 4, C // 2), w(C // 4), w(2, C // 4), w(2),
                  half(B, N, dtype=torch.bool))


CALLS = [  # what launches, and the files of the kernels; the first two are passed
    (policy, ("policy_attention", "policy_attention_backward")), (short, ("short_attention", "short_attention_backward")),
    (select, ("select_tokens",)), (select_norm, ("select_norm",)), (compact, ("compact_tokens",)), (norm, ("add_norm", "layer_norm")),
    (score, ("score_tokens",)), (sliced, ("sliced_linear", "sliced_mlp", "sliced_product", "sliced_product_large"))]
