import pytest
import torch
from oracles import check_operator

from vitprune import ops


@pytest.mark.parametrize("shape", [(3, 6, 4), (1, 1, 1), (0, 5, 2), (2, 0, 3), (4, 7, 0)])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_rows_and_inverse(shape, density):
    torch.manual_seed(0)
    x, keep = torch.randn(shape), torch.rand(shape[:2]) < density
    rows, cu_seqlens = ops.compact_tokens(x, keep)
    assert torch.equal(rows, x[keep])
    assert cu_seqlens.tolist() == [0, *torch.cumsum(keep.sum(1), 0).tolist()] and cu_seqlens.dtype == torch.int32
    for fill in (0.0, -1.0):
        assert torch.equal(ops.expand_rows(rows, cu_seqlens, keep, fill=fill), torch.where(keep[..., None], x, fill))


def test_capacity():
    x, keep = torch.randn(2, 4, 3), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    rows, cu_seqlens = ops.compact_tokens(x, keep, capacity=5)
    assert torch.equal(rows[:3], x[keep]) and not rows[3:].any() and rows.shape == (5, 3)
    assert ops.compact_tokens(x, keep, capacity=11)[0].shape == (11, 3)
    assert torch.equal(ops.expand_rows(rows, cu_seqlens, keep), torch.where(keep[..., None], x, 0))
    with pytest.raises(RuntimeError, match="more tokens kept than capacity 2"):
        ops.compact_tokens(x, keep, capacity=2)


def test_registered():
    x, keep = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    check_operator(torch.ops.vitprune.compact_tokens.default, [x, keep, 5, "reference"], (0,))
    rows, cu_seqlens = ops.compact_tokens(x, keep)
    check_operator(torch.ops.vitprune.expand_rows.default, [rows, cu_seqlens, keep, 0.0, "reference"], (0,))
