"""What the operator tests share: slow, loop-by-loop truths in numpy float64, and the contract of every registered operator."""
import math

import numpy as np
import torch


def attention(q, k, v, scale, weight=None, eps=0.0):
    """One head: q, k, v [N, D] float64; weight [N, N] multiplies the exponentials. Row by row, by the formula."""
    N = len(q)
    out = np.zeros_like(v)
    for i in range(N):
        s = np.array([scale * float(q[i] @ k[j]) for j in range(N)])
        e = np.exp(s - s.max()) * (1.0 if weight is None else weight[i])
        a = (e + eps / N) / (e.sum() + eps)
        out[i] = sum(a[j] * v[j] for j in range(N))
    return out


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def check_operator(op, args, differentiable=()):
    """opcheck (schema, fake, autograd, AOT) and, in float64, gradcheck with respect to the arguments at those positions."""
    args = [a.detach().requires_grad_() if i in differentiable else a for i, a in enumerate(args)]
    torch.library.opcheck(op, tuple(args))
    if not differentiable:
        return

    def of(*values):
        full = list(args)
        for i, value in zip(differentiable, values):
            full[i] = value
        out = op(*full)
        return tuple(o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad)

    assert torch.autograd.gradcheck(of, tuple(args[i] for i in differentiable))


def within_twice(got, reference, truth):
    """The error is at most twice that of the plain implementation in the same dtype (+1e-5)."""
    error = lambda t: (t.double() - truth).abs().max().item() if t.numel() else 0.0  # noqa: E731
    assert error(got) <= 2 * error(reference) + 1e-5


def within_twice_unless_lucky(got, reference, truth, units=8):
    """`within_twice`; or, returning True, within that many units in the last place of the largest value (of one, where terms of order one
    cancel): of a few values the reference may round every one luckily. Callers bound how often."""
    try:
        within_twice(got, reference, truth)
    except AssertionError:
        largest = truth.abs().max().clamp(min=1.0).log2().floor().exp2()
        assert (got.double() - truth).abs().max() <= units * largest * torch.finfo(got.dtype).eps
        return True
    return False
