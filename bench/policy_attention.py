"""policy_attention beside plain PyTorch: `python -m bench.policy_attention [DEVICE]` prints JSON."""
import functools

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.common import forced, kernels, kinds, main, share_of_limit, timed
from bench.short_attention import heads, merged
from vitprune import cases
from vitprune.bench import DTYPES
from vitprune.cases import HEADS, Size, calls
from vitprune.ops import policy_attention, split_qkv


def shapes(device: torch.device, brief: bool):
    """(B, N, H): DynamicViT trains at the full number of tokens."""
    if device.type != "cuda":
        return [(B, 197, 6) for B in (1, 8, 32)]
    if brief:
        return [(128, 197, 12), (128, 197, 6), (1, 197, 6)]
    return [(B, N, H) for H in HEADS.values() for B in (1, 8, 32, 128, 512) for N in ((197, 577) if B == 32 else (197,))]


def ours(x, policy, H: int):
    return merged(policy_attention(*split_qkv(x, H), policy))


def sdpa(x, policy, H: int, only: SDPBackend, masked: bool):
    """The library's call, with a mask or none: neither eps nor a gradient for the policy, a bound on what can be reached."""
    q, k, v = heads(x, H)
    mask = (policy > 0)[:, None, None, :] | torch.eye(policy.shape[1], dtype=torch.bool, device=x.device) if masked else None
    with sdpa_kernel(only):
        return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def saved(function, args) -> int:
    """Bytes that a call keeps for its gradient beside its arguments."""
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*args)  # while it is there, so is all it keeps
    del out
    return sum(size for at, size in kept.items() if at not in {a.untyped_storage().data_ptr() for a in args})


def flex(x, policy, H: int):
    """FlexAttention adds log(policy + tiny): close where the policy is kept away from 0, without the eps of the definition."""
    from torch.nn.attention.flex_attention import flex_attention
    bias = (policy + 1e-6).log()
    return merged(flex_attention(*heads(x, H), score_mod=lambda s, b, h, i, j: torch.where(i == j, s, s + bias[b, j])))


def candidates(device: torch.device, dtype: torch.dtype) -> dict:
    """Name -> function(x, policy, H), or the reason why there is none."""
    found = {"eager": forced("reference", ours), "compiled": forced("reference", torch.compile(ours, dynamic=False)),
             "flex": torch.compile(flex, dynamic=False)}
    for only in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for masked in (False, True):
            name = f"sdpa {only.name.lower()} mask" if masked else f"unmasked sdpa {only.name.lower()}"  # what no policy would cost
            found[name] = functools.partial(sdpa, only=only, masked=masked)
    return found | kernels("policy_attention", device, dtype, ours)


def rows(device: torch.device, min_time: float = 0.05, brief: bool = False):
    """A row a shape, dtype and direction: milliseconds, bytes that must move, MACs, and the share of the card's limit."""
    for kind in kinds(device, brief):
        for B, N, H in shapes(device, brief):
            torch._dynamo.reset()  # one shape's graphs do not count against the next one's
            functions = candidates(device, DTYPES[kind])
            x, policy = cases.inputs("policy_attention", Size(B, H, 0.7, tokens=N), device, DTYPES[kind])[1]
            up = torch.randn(B, N, H * 64, device=device).to(DTYPES[kind])
            for backward in (False, True):
                inputs = [x.requires_grad_(backward), policy.requires_grad_(backward)]
                with torch.set_grad_enabled(backward):
                    bound = {n: f if isinstance(f, str) else functools.partial(f, H=H) for n, f in functions.items()}
                    ready, refused = calls(bound, inputs, up, backward)
                    columns = timed(ready, device, min_time)
                moved = up.nbytes * (4 + 8 * backward)  # q, k, v, out; backward: q, k, v, out, dout and the three gradients
                macs = 2 * B * H * N * N * 64 * (3.5 if backward else 1)  # backward: five products of that size where the forward has two
                row = {"B": B, "N": N, "H": H, "dtype": kind, "pass": "forward+backward" if backward else "forward", "bytes": moved,
                       "macs": macs, **columns, "unavailable": {n: r[:160] for n, r in refused.items()}}
                if backward:
                    ours_and_eager = {"eager", *kernels("policy_attention", device, DTYPES[kind], ours)} & ready.keys()
                    row["saved_bytes"] = {n: saved(bound[n], inputs) for n in sorted(ours_and_eager)}
                yield row | share_of_limit(device, row)


if __name__ == "__main__":
    main(rows)
