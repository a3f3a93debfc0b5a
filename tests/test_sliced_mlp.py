import numpy as np
import pytest
import torch
from oracles import check_operator, gelu

from vitprune import ops


def inputs():
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (8, 5), (8,), (5, 8), (5,)]
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("live", [[], [2], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("residual", [True, False])
def test_is_the_masked_dense_mlp(live, residual):
    x, w1, b1, w2, b2 = inputs()
    mask = np.zeros(8)
    mask[[2 * i + j for i in live for j in range(2)]] = 1
    hidden = gelu(x.numpy() @ w1.numpy().T + b1.numpy()) * mask
    expected = hidden @ w2.numpy().T + b2.numpy() + (x.numpy() if residual else 0)
    got = ops.sliced_mlp(x, w1, b1, w2, b2, torch.tensor(live, dtype=torch.int32), width=2, residual=x if residual else None)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


def test_registered():
    x, w1, b1, w2, b2 = inputs()
    live, op = torch.tensor([0, 3], dtype=torch.int32), torch.ops.vitprune.sliced_mlp.default
    check_operator(op, [x, w1, b1, w2, b2, live, torch.randn_like(x), 2, "reference"], (0, 1, 2, 3, 4, 6))
    check_operator(op, [x, w1, None, w2, None, live, None, 2, "reference"], (0, 1, 3))


def test_dead_units_get_exactly_zero():
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in inputs())
    ops.sliced_mlp(x, w1, b1, w2, b2, torch.tensor([0, 3], dtype=torch.int32), width=2).square().sum().backward()
    assert not w1.grad[2:6].any() and not b1.grad[2:6].any() and not w2.grad[:, 2:6].any()
    assert w1.grad[:2].all() and w2.grad[:, 6:].all()
