"""policy_attention in Triton, C++ and CUDA C++."""
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_checks import ARCHS, CPP, CUDA, DEVICES, INTERPRETED, SHARED, compile_launch, counts, kernels, record
from oracles import within_twice
from policy_attention_cases import DTYPES, check_many, run, true
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vitprune import ops
from vitprune.ops import backend

KERNELS, EMULATED = [*kernels("triton", cpp=CPP), CUDA[0]], CUDA[1:]
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("name, device", KERNELS)
def test_kernel(name, device, count):
    check_many(name, device, count)


@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("name, device", EMULATED)
def test_emulated(name, device, count):
    check_many(name, device, count)


@pytest.mark.parametrize("name, device", KERNELS)
def test_golden_units(name, device):
    """The official code's weights and gradients: queries that are the scores, keys and values that are unit vectors."""
    golden = np.load(Path(__file__).parent / "data" / "golden_units.npz")
    B, H, N, _ = golden["swp_attn"].shape
    scores, up = (F.pad(torch.from_numpy(golden[f"swp_{key}"]), (0, 32 - N)).to(device) for key in ("attn", "w"))
    units, policy = torch.eye(N, 32, device=device).expand(B, H, N, 32), torch.from_numpy(golden["swp_policy"])[..., 0].to(device)
    for kind, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        if name == "cpp" and dtype == torch.float16:
            continue
        leaves = [t.detach().to(dtype).requires_grad_() for t in (scores, units, units, policy)]
        wide = [t.detach().double().requires_grad_() for t in leaves]

        def results(out, of):
            dq, _, _, dpolicy = torch.autograd.grad(out, of, up.to(dtype).to(out.dtype))  # noqa: B023
            return out[..., :N], dq[..., :N], dpolicy[..., None]  # noqa: B023
        with backend(name):
            got = results(ops.policy_attention(*leaves, scale=1.0), leaves)
        with backend("reference"):
            plain = results(ops.policy_attention(*wide, scale=1.0), wide)
        for a, b, key in zip(got, plain, ("out", "gattn", "gpol")):
            within_twice(a, torch.from_numpy(golden[f"swp_{kind}_{key}"]).to(device), b)
    q = torch.zeros(1, 1, 4, 32, device=device)
    q[..., 3] = 30  # the score of the last key, which is dropped and leaves the others little but eps
    with backend(name):
        out = ops.policy_attention(q, *2 * [torch.eye(4, 32, device=device)[None, None]], torch.tensor([[1.0, 1, 1, 0]], device=device),
                                   scale=1.0)
    np.testing.assert_allclose(out[..., :4].cpu().numpy(), golden["swp_underflow_out"], atol=1e-6)


@pytest.mark.parametrize("name, device", KERNELS + EMULATED + [("reference", "cpu")])
def test_autocast_leaves_the_policy_alone(name, device):
    """Its gradient sums over heads and rows: in float16 it would overflow where everything else is in range."""
    torch.manual_seed(0)
    kind = torch.bfloat16 if name == "cpp" else torch.float16
    q, k, v = (torch.randn(1, 8, 40, 32, device=device) for _ in range(3))
    policy, up = torch.full((1, 40), 0.01, device=device, requires_grad=True), torch.full((1, 8, 40, 32), 3e3, device=device, dtype=kind)
    with backend(name), torch.autocast(device, kind):
        out = ops.policy_attention(q, k, v, policy)
    got, = torch.autograd.grad(out, policy, up.to(out.dtype))
    truth, = torch.autograd.grad(ops.policy_attention(*(t.double() for t in (q, k, v)), policy.double()), policy, up.double())
    assert out.dtype == kind and got.dtype == torch.float32 and truth.abs().max() > 65504
    torch.testing.assert_close(got, truth.float(), rtol=2e-2, atol=2e-2 * float(truth.abs().max()))


@pytest.mark.parametrize("name, device", KERNELS)
@pytest.mark.parametrize("B, H, N, D", [(257, 1, 1, 32), (1, 1, 2, 64), (2, 1, 15, 80), (1, 2, 16, 48), (1, 1, 17, 96), (1, 1, 50, 112),
                                        (1, 1, 196, 64), (1, 1, 197, 64), (1, 1, 198, 128)])
def test_edges(name, device, B, H, N, D):
    torch.manual_seed(0)
    for eps in (1e-6, 0.0):
        for share in (0.0, 0.5, 1.0) if B == 1 else (0.5,):  # no key but a token's own, some, all
            tensors = [*(torch.randn(B, H, N, D, device=device) for _ in range(3)), (torch.rand(B, N, device=device) < share).float()]
            up = torch.randn(B, H, N, D, device=device)
            for a, b in zip(run(name, tensors, up, eps), true(tensors, up, eps)):
                assert (a.double() - b).abs().max() <= 1e-5 * (1 + b.abs().max())


@pytest.mark.parametrize("name, device", KERNELS + EMULATED)
def test_long_sequences_and_large_scores(name, device):
    torch.manual_seed(0)
    for N, eps in ((577, 1e-6), (1025, 0.0)):
        tensors = [*(3 * torch.randn(1, 1, N, 32, device=device) for _ in range(3)), torch.randint(2, (1, N), device=device).float()]
        up = torch.randn(1, 1, N, 32, device=device)
        for a, b in zip(run(name, tensors, up, eps), true(tensors, up, eps)):
            assert (a.double() - b).abs().max() <= 1e-4 * (1 + b.abs().max())


@pytest.mark.parametrize("name, device", KERNELS + EMULATED + [("closed form", "cpu")])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_gradient_where_dropped_scores_lead(name, device, eps):
    """Where dropped keys alone are near a row's maximum, eps is much of its sum, and the gradient of the maximum counts."""
    torch.manual_seed(0)
    for N, width, dtype in ((20, 32, torch.float32), (65, 64, torch.float32), (65, 64, torch.bfloat16)):
        q, k = (3 * torch.randn(1, 2, N, width, device=device).to(dtype) for _ in range(2))
        v, up = (torch.randn(1, 2, N, width, device=device).to(dtype) for _ in range(2))
        tensors = [q, k, v, (torch.rand(1, N, device=device) < 0.4).to(dtype)]
        for a, b, plain in zip(run(name, tensors, up, eps), true(tensors, up, eps), run("reference", tensors, up, eps)):
            least = (1e-5 if dtype == torch.float32 else 2 ** -8) * b.abs().max()
            assert (a.double() - b).abs().max() <= 2 * (plain.double() - b).abs().max() + least


@pytest.mark.parametrize("name, device", KERNELS + EMULATED)
def test_keeps_what_is_dropped_apart(name, device):
    """eps = 0: NaN, infinities and huge scores of dropped tokens stay in their own rows; a token alone sees itself."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 20, 32, device=device) for _ in range(3))
    policy = torch.ones(2, 20, device=device)
    policy[:, 4:9] = 0
    with backend(name):
        clean = ops.policy_attention(q, k, v, policy, eps=0)
        q[:, :, 4], k[:, :, 4], v[:, :, 5], v[:, :, 6] = torch.nan, torch.inf, torch.nan, -torch.inf
        k[:, :, 7] *= 1e5
        out = ops.policy_attention(q, k, v, policy, eps=0)
        kept = [i for i in range(20) if i not in range(4, 9)]
        torch.testing.assert_close(out[:, :, kept], clean[:, :, kept])
        assert out[:, :, 4:6].isnan().all() and (out[:, :, 6] == -torch.inf).all() and out[:, :, 7:9].isfinite().all()
        alone = ops.policy_attention(q[:, :, 8:9], k[:, :, 8:9], v[:, :, 8:9], policy[:, 8:9], eps=0)
        torch.testing.assert_close(alone, v[:, :, 8:9])


@pytest.mark.parametrize("name, device", KERNELS + EMULATED)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_kernel_registered_and_deterministic(name, device, eps):
    torch.manual_seed(0)
    tensors = [*(torch.randn(2, 2, 9, 32, device=device) for _ in range(3)), torch.rand(2, 9, device=device)]
    up = torch.randn(2, 2, 9, 32, device=device)
    op = torch.ops.vitprune.policy_attention.default
    torch.library.opcheck(op, (*(t.clone().requires_grad_() for t in tensors), 0.2, eps, name))
    first = run(name, tensors, up, eps)
    with backend(name):
        compiled = torch.compile(lambda *t: ops.policy_attention(*t, eps=eps), fullgraph=True, backend="aot_eager")
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = compiled(*leaves)
        for again in (run(name, tensors, up, eps), (out, *torch.autograd.grad(out, leaves, up))):
            assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert compiled(*(t[:, :, :7] for t in tensors[:3]), tensors[3][:, :7]).shape == (2, 2, 7, 32)


@pytest.mark.parametrize("name, device", CUDA)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_cuda_edges(name, device, eps):
    """Few images, tokens and heads, lengths around a step and around a block, the widest and narrowest heads."""
    torch.manual_seed(0)
    for shape in ((0, 2, 5, 16), (2, 2, 0, 16), (2, 0, 3, 16)):  # nothing is launched
        q, policy = torch.randn(shape, device=device), torch.rand(shape[0], shape[2], device=device)
        out, m, z = torch.ops.vitprune.policy_attention(q, q, q, policy, 0.25, eps, name)
        dqkv, dpolicy = torch.ops.vitprune.policy_attention_backward(q, q, q, q, policy, out, m, z, 0.25, eps, name)
        B, H, N, D = shape
        assert (out.shape, dqkv.shape, dpolicy.shape) == (shape, (B, N, 3, H, D), policy.shape) and not dpolicy.any()
    for B, N, H, D in [(1, 1, 1, 16), (33, 1, 1, 16), (2, 15, 1, 16), (1, 16, 2, 48), (1, 17, 1, 32), (1, 33, 1, 128), (1, 63, 1, 80),
                       (1, 64, 1, 64), (1, 65, 1, 112)]:
        for dtype in (torch.float32, torch.float16):
            qkv = [torch.randn(B, H, N, D, device=device).to(dtype) for _ in range(3)]
            tensors, up = [*qkv, torch.randint(2, (B, N), device=device).to(dtype)], torch.randn(B, H, N, D, device=device).to(dtype)
            for a, b in zip(run(name, tensors, up, eps), true(tensors, up, eps)):
                rtol, atol = (1e-4, 2e-5) if dtype == torch.float32 else (4e-3, 4e-3)
                torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol * max(1, b.abs().max().item() if b.numel() else 1))


@pytest.mark.parametrize("name, device", CUDA)
def test_cuda_weighs_keys_far_below_a_dropped_one(name, device):
    """eps > 0: weights of e^-10 and less, which half precision has no digits for, count as in the definition; gradients of other rows
    stay finite where a dropped token's value is not (eps = 0)."""
    torch.manual_seed(0)
    for gap in (10.0, 13.0, 30.0):
        q, k, v, up = (torch.randn(1, 1, 20, 32, device=device).half() for _ in range(4))
        q[..., 0], k[..., 0] = 1, 0
        k[:, :, 5, 0] = gap * 32 ** 0.5
        policy = torch.ones(1, 20, device=device)
        policy[:, 5] = 0
        for out, truth, plain in zip(*(run(n, (q, k, v, policy), up, 1e-6, f) for n, f in (
                (name, lambda t: t), ("reference", torch.Tensor.double), ("reference", lambda t: t)))):
            error = (plain.double() - truth).abs().max() + torch.finfo(torch.float16).eps * truth.abs().max()
            assert (out.double() - truth).abs().max() <= 2 * error
    v[:, :, 5] = torch.inf
    with backend(name):
        q.requires_grad_()
        dq, = torch.autograd.grad(ops.policy_attention(q, k, v, policy, eps=0), q, up)
    assert dq[:, :, [i for i in range(20) if i != 5]].isfinite().all()


@pytest.mark.parametrize("name, device", CUDA)
def test_cuda_refuses(name, device):
    q = torch.randn(1, 1, 4, 8, device=device)
    with backend("cuda"):
        for D in (8, 40, 144):
            with pytest.raises(RuntimeError, match="a head's width is not a multiple of 16 in 16..128"):
                ops.policy_attention(*(q.new_ones(1, 1, 4, D),) * 3, torch.ones(1, 4, device=device))
        with pytest.raises(RuntimeError, match="no kernel for torch.float64"):
            ops.policy_attention(*(q.double(),) * 3, torch.ones(1, 4, device=device).double())


@pytest.mark.parametrize("name, device", KERNELS)
def test_gradient_of_a_fused_buffer(name, device):
    """It is that of its parts, and where a kernel wrote it nothing is copied together."""
    B, N, H, D = 2, 9, 3, 16
    generator = torch.Generator().manual_seed(0)
    buffer, up = (torch.randn(B, N, k * H * D, generator=generator).to(device) for k in (3, 1))
    policy = torch.randint(2, (B, N), generator=generator).float().to(device)
    grads, copied = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copied.append(function in (torch.ops.aten.cat.default, torch.ops.aten.stack.default))
            return function(*args, **kwargs or {})
    for split in (ops.split_qkv, lambda x, H: x.unflatten(-1, (3, H, D)).transpose(1, 3).unbind(2)):
        x = buffer.clone().requires_grad_()
        with backend(name):
            y = ops.policy_attention(*split(x, H), policy).transpose(1, 2).flatten(2)
        copied.clear()
        with Watch():
            grads.append(torch.autograd.grad(y, x, up)[0])
        assert any(copied) == (split is not ops.split_qkv)
    assert torch.equal(*grads)


@pytest.mark.parametrize("name, device", [*KERNELS, *EMULATED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_where_one_row_feels_its_maximum(name, device, dtype, monkeypatch):
    """One row of many prefers a dropped key; what the kernels tell each other holds for all rows, whatever their memory held before."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, up = (0.1 * torch.randn(1, 2, 80, 32, generator=generator).to(device) for _ in range(4))
    k[:, :, 7, 0], q[:, :, 70, 0] = 30, 3
    policy = torch.ones(1, 80, device=device)
    policy[:, 7] = 0
    tensors, up = [t.to(dtype) for t in (q, k, v, policy)], up.to(dtype)
    empty = torch.empty

    def full(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(3 if t.dtype == torch.int32 else 7)
    monkeypatch.setattr(torch, "empty", full)
    got = run(name, tensors, up, 1e-6)
    monkeypatch.undo()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, true(tensors, up, 1e-6)):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
def test_triton_refuses(device):
    q = torch.randn(1, 1, 4, 8, device=device)
    with backend("triton"):
        with pytest.raises(RuntimeError, match="the heads. width is not a multiple of 16 in 16..128"):
            ops.policy_attention(q, q, q, torch.ones(1, 4, device=device))
        with pytest.raises(RuntimeError, match="no kernel for torch.float64"):
            ops.policy_attention(*(q.double(),) * 3, torch.ones(1, 4, device=device).double())


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", [a if a in (75, 80, 90, 120) else pytest.param(a, marks=pytest.mark.long) for a in ARCHS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, pytest.param(32, marks=pytest.mark.long), 128])
def test_triton_compiles(D, dtype, arch, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import policy_attention as kernel
    from vitprune.kernels import policy_attention_backward as backward_kernels
    monkeypatch.setattr(kernel.configs, "capability", lambda device: arch)
    q, k, v = torch.empty(8, 197, 3, 6, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    policy, m = torch.empty(8, 197, dtype=dtype), torch.empty(8, 6, 197)
    for eps in (1e-6, 0.0):
        launches = record(monkeypatch, kernel, lambda: kernel.launch(q, k, v, policy, 0.125, eps))  # noqa: B023
        launches += record(monkeypatch, backward_kernels, lambda: backward_kernels.launch(  # noqa: B023
            q, q, k, v, policy, q, m, m, 0.125, eps))  # noqa: B023
        assert len(launches) == 3
        for launch in launches:
            built = compile_launch(*launch, arch)
            assert built["spills"] == 0
            assert built["shared"] <= SHARED[arch]
            if arch >= 80 and dtype != torch.float32:
                assert "mma.sync" in built["ptx"] or "wgmma" in built["ptx"] or "tcgen05" in built["ptx"]
            if arch == 90 and dtype != torch.float32 and launch[2]["KEYS" if "key_gradient" in launch[0].__name__ else "QUERIES"] >= 64:
                assert "wgmma" in built["ptx"]
