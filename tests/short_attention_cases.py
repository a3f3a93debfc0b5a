"""Random cases of short_attention."""
import numpy as np
import torch
from hypothesis import strategies as st
from kernel_checks import ON_CARD, VARIANTS, layout

from vitprune import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_case(seed, real):
    """Drawn by numpy: hypothesis repeats its choices, and a fifth of the cases would have most of the dtypes."""
    rng = np.random.default_rng(seed)
    H, D = (2, 64) if real else (int(rng.integers(1, 4)), int(rng.integers(1, 9)) * 16)
    B, least, most = (2, 64, 260) if real else (B := int(rng.integers(1, 5)), 0, int(rng.choice((64, 128, 256))) // (B * H))
    case = {"H": H, "D": D, "lengths": rng.integers(least, most + 1, B).tolist(), "packed": rng.random() < 0.5, "real": real,
            "dtype": DTYPES[rng.integers(3)], "scale": (None, 0.05, 2 * D ** -0.5, -0.1, 0.0)[rng.integers(5)],
            "spare": int(rng.integers(0, 20)), "tiles": int(rng.choice((1, 4) if real else (0, 1, 2, 3, 4))), "seed": seed}
    if ON_CARD:  # of every dtype one variant is contiguous; tiles follow the longest sequence, which is the first
        v = seed % VARIANTS
        most = ((197, 64, 68, 97, 138, 260, 80, 112, 145, 177, 208, 256) if real else (64, 1, 0, 2, 15, 16, 17, 31, 33, 48, 65, 128))[v]
        case |= {"D": D if real else 16 * (1 + v % 8), "dtype": DTYPES[v % 3], "packed": v // 2 % 2 == 1,
                 "lengths": [most, *rng.integers(min(least, most), most + 1, B - 1).tolist()],
                 "tiles": (1, 4)[v // 3 % 2] if real else v % 5, "layouts": (v % 5, v // 2 % 5)}
    return case


def cases(real):
    return st.integers(0, 2 ** 32 - 1).map(lambda seed: random_case(seed, real))


def describe(case):
    N = max(case["lengths"])
    return [str(case["dtype"]), f"D={case['D']}", f"tiles={case['tiles']}", *(k for k in ("packed", "real") if case[k]),
            "N=" + next(f"..{most}" for most in (0, 1, 16, 64, 128, 256, 999) if N <= most)]


def tensors_of(case, device):
    """qkv, the upstream gradient, cu_seqlens or None, max_seqlen; NaN in rows that belong to no sequence."""
    rng, C = np.random.default_rng(case["seed"]), case["H"] * case["D"]
    shape = (sum(case["lengths"]) + case["spare"],) if case["packed"] else (len(case["lengths"]), case["lengths"][0])
    qkv, up = (torch.from_numpy(rng.standard_normal((*shape, width))).to(device, case["dtype"]) for width in (3 * C, C))
    kinds = case.get("layouts", (None, None))
    qkv, up = layout(qkv, rng, kinds[0]), layout(up, rng, kinds[1])
    if not case["packed"]:
        return qkv, up, None, None
    for t in (qkv, up):
        if case["spare"] and 0 not in t.stride():
            t[-case["spare"]:] = float("nan")
    cu_seqlens = torch.tensor([0, *np.cumsum(case["lengths"])], dtype=torch.int32, device=device)
    return qkv, up, cu_seqlens, max(case["lengths"]) + case["spare"] % 3


def run(name, tensors, case, convert=lambda t: t):
    """The output and the gradients of q, k and v, with the tiles of the case."""
    qkv, up, cu_seqlens, most = tensors
    qkv = convert(qkv).detach().requires_grad_()
    with ops.backend(name):
        out = ops.short_attention(qkv, num_heads=case["H"], cu_seqlens=cu_seqlens, max_seqlen=most, scale=case["scale"])
        return out, *torch.autograd.grad(out, qkv, convert(up))[0].chunk(3, -1)
