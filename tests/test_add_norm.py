import numpy as np
import pytest
import torch
from oracles import check_operator

from vitprune import ops


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 8), (0, 8)])
def test_formula(scaled, shape):
    torch.manual_seed(0)
    x, r = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weight, bias, gamma = torch.randn(3, 8, dtype=torch.float64)
    s, y = ops.add_norm(x, r, weight, bias, 1e-6, gamma=gamma if scaled else None)
    expected = x.numpy() + r.numpy() * (gamma.numpy() if scaled else 1)
    np.testing.assert_allclose(s.numpy(), expected, atol=1e-14)
    centred = expected - expected.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y.numpy(), normal * weight.numpy() + bias.numpy(), atol=1e-12)


def test_registered():
    x, r = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    weight, bias, gamma = torch.randn(3, 8, dtype=torch.float64)
    op = torch.ops.vitprune.add_norm.default
    check_operator(op, [x, r, weight, bias, gamma, 1e-5, "reference"], (0, 1, 2, 3, 4))
    check_operator(op, [x, r, weight, None, None, 1e-5, "reference"], (0, 1, 2))
