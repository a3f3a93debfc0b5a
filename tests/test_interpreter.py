"""The interpreter that kernels are tested under (tests/interpreter.py) keeps what it was hastened at the cost of."""
import pytest
import torch
from kernel_checks import INTERPRETED

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")]


def test_sums_that_overflow_are_errors():
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def double(x):
        value = tl.load(x)
        tl.store(x, value + value)
    for most in (2 ** 30 - 1, 2 ** 30):
        x = torch.tensor([most], dtype=torch.int32)
        if most + most < 2 ** 31:
            double[(1,)](x)
            assert x.item() == 2 * most
        else:
            with pytest.raises(Exception, match="add of int32 overflows"):
                double[(1,)](x)


def test_rounds_to_nearest():
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def convert(x, y):
        tl.store(y + tl.arange(0, 64), tl.load(x + tl.arange(0, 64)).to(tl.bfloat16))
    x, y = torch.randn(64), torch.empty(64, dtype=torch.bfloat16)
    convert[(1,)](x, y)
    assert torch.equal(y, x.bfloat16())
