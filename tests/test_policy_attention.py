"""policy_attention: the definition, what PyTorch makes of it, and the split of a fused buffer."""
import numpy as np
import pytest
import torch
from oracles import attention, check_operator, within_twice
from torch._subclasses.fake_tensor import FakeTensorMode

from vitprune import ops

pytestmark = pytest.mark.usefixtures("poison")


def inputs(B=2, H=2, N=5, D=4, dtype=torch.float64):
    torch.manual_seed(0)
    return [*(torch.randn(B, H, N, D, dtype=dtype) for _ in range(3)), torch.rand(B, N, dtype=dtype)]


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("N", [1, 2, 7])
@pytest.mark.parametrize("hard", [True, False])
def test_formula(eps, N, hard):
    q, k, v, policy = inputs(N=N)
    policy = (policy > 0.5).double() if hard else policy
    out = ops.policy_attention(q, k, v, policy, eps=eps)
    for b in range(2):
        pairs = np.where(np.eye(N, dtype=bool), 1.0, policy[b].numpy()[None, :])
        for h in range(2):
            expected = attention(*(t[b, h].numpy() for t in (q, k, v)), 0.5, pairs, eps)
            np.testing.assert_allclose(out[b, h].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_registered(eps):
    check_operator(torch.ops.vitprune.policy_attention.default, [*inputs(), 0.5, eps, "reference"], (0, 1, 2, 3))
    q, k, v, policy = inputs()
    op = torch.ops.vitprune.policy_attention(q, k, v, policy, 0.5, eps, "reference")[0]
    assert torch.allclose(op, ops.policy_attention(q, k, v, policy, eps=eps), atol=1e-14)


def test_all_kept_is_softmax_attention():
    q, k, v, _ = inputs(N=50, D=16, dtype=torch.float32)
    out = ops.policy_attention(q, k, v, torch.ones(2, 50), eps=0)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-6)


def test_dropped_tokens_are_harmless_at_eps_0():
    """NaN, infinities and huge scores in dropped tokens stay in their own rows; every row is finite otherwise."""
    q, k, v, _ = inputs(N=6)
    policy = torch.ones(2, 6, dtype=torch.float64)
    policy[:, 4:] = 0
    clean = ops.policy_attention(q, k, v, policy, eps=0)
    q[:, :, 4], k[:, :, 4], v[:, :, 5] = torch.nan, torch.inf, torch.nan
    k[:, :, 5] *= 1e5
    out = ops.policy_attention(q, k, v, policy, eps=0)
    assert torch.allclose(out[:, :, :4], clean[:, :, :4], atol=1e-12)
    assert ops.policy_attention(q, k.nan_to_num(), v.nan_to_num(), torch.zeros_like(policy), eps=0)[:, :, :4].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)])
def test_empty(shape):
    q = torch.randn(shape)
    assert ops.policy_attention(q, q, q, torch.ones(shape[0], shape[2]), eps=0 if shape[2] == 0 else 1e-6).shape == shape


def test_strides():
    buffer = torch.randn(2, 5, 3, 2, 4)
    q, k, v = buffer.permute(2, 0, 3, 1, 4).unbind(0)
    policy = torch.tensor([1.0, 0, 1, 1, 0]).expand(2, 5)
    expected = ops.policy_attention(q.contiguous(), k.contiguous(), v.contiguous(), policy.contiguous())
    assert torch.allclose(ops.policy_attention(q, k, v, policy), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_registered_form_is_accurate(dtype, eps):
    """The closed form accumulates in float32: at most twice plain PyTorch's error, forward and every gradient."""
    q, k, v, policy = inputs(N=65, D=32)
    policy = (policy > 0.3).double()
    weight = torch.randn_like(q)

    def run(kind, op):
        leaves = [t.to(kind).requires_grad_() for t in (q, k, v, policy)]
        out = op(*leaves)
        return [out, *torch.autograd.grad((out * weight.to(kind)).sum(), leaves)]

    def plain(*t):
        return ops.policy_attention(*t, eps=eps)

    for got, reference, truth in zip(run(dtype, lambda *t: torch.ops.vitprune.policy_attention(*t, 32 ** -0.5, eps, "reference")[0]),
                                     run(dtype, plain), run(torch.float64, plain)):
        within_twice(got, reference, truth)


def test_split_of_a_fused_buffer():
    """Views, with a gradient to any degree, many at once, and of tensors that hold no values."""
    buffer = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = ops.split_qkv(buffer, 2)
    assert torch.equal(torch.stack((q, k, v), 2), buffer.unflatten(-1, (3, 2, 4)).transpose(1, 3))
    assert q.data_ptr() == buffer.data_ptr()
    assert torch.autograd.gradcheck(lambda x: ops.split_qkv(x, 2), buffer)
    assert torch.autograd.gradgradcheck(lambda x: [t.square() for t in ops.split_qkv(x, 2)], buffer)
    policy, ups = torch.ones(2, 5, dtype=torch.float64), torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    out = ops.policy_attention(q, k, v, policy)
    batched, = torch.autograd.grad(out, buffer, ups, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, torch.stack([torch.autograd.grad(out, buffer, up, retain_graph=True)[0] for up in ups]))
    with FakeTensorMode():
        fake = torch.randn(2, 5, 24, requires_grad=True)
        out = ops.policy_attention(*ops.split_qkv(fake, 2), torch.ones(2, 5))
        assert torch.autograd.grad(out.sum(), fake)[0].shape == fake.shape


def test_compiled_with_dynamic_sizes():
    compiled = torch.compile(ops.policy_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, H, N, D in ((2, 3, 5, 16), (3, 2, 7, 32)):
        q, policy = torch.randn(B, H, N, D, requires_grad=True), torch.ones(B, N)
        torch.testing.assert_close(compiled(q, q, q, policy), ops.policy_attention(q, q, q, policy))
