import numpy as np
import pytest
import torch
from oracles import check_operator

from vitprune import ops


def inputs(live, side):
    torch.manual_seed(0)
    w, b = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    x = torch.randn(2, 3, 6 if side == "out" else 2 * len(live), dtype=torch.float64)
    return x, w if side == "out" else torch.randn(8, 8, dtype=torch.float64), b, torch.tensor(live, dtype=torch.int32)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("live", [[], [1], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_masked_dense_layer(side, live, bias):
    x, w, b, ids = inputs(live, side)
    b = b if bias else None
    units = [2 * i + j for i in live for j in range(2)]
    got = ops.sliced_linear(x, w, b, ids, side=side, width=2)
    offset = 0 if b is None else b.numpy()
    if side == "out":
        expected = (x.numpy() @ w.numpy().T + offset)[..., units]
    else:
        full = np.zeros((2, 3, 8))
        full[..., units] = x.numpy()
        expected = full @ w.numpy().T + offset
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("side", ["in", "out"])
def test_registered(side):
    x, w, b, live = inputs([0, 3], side)
    op = torch.ops.vitprune.sliced_linear.default
    check_operator(op, [x, w, b, live, side, 2, "reference"], (0, 1, 2))
    check_operator(op, [x, w, None, live, side, 2, "reference"], (0, 1))


@pytest.mark.parametrize("side", ["in", "out"])
def test_dead_weights_get_exactly_zero(side):
    x, w, b, live = inputs([0, 3], side)
    w.requires_grad_()
    ops.sliced_linear(x, w, b, live, side=side, width=2).square().sum().backward()
    dead = w.grad[2:6] if side == "out" else w.grad[:, 2:6]
    assert not dead.any() and w.grad.abs().sum() > 0
