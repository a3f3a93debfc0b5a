"""Selection and LayerNorm in one launch, beside the truth of the selection and float64."""
import numpy as np
import pytest
import torch
from kernel_checks import ARCHS, DEVICES, INTERPRETED, SHARED, compile_launch, counts, kernels, record, seeds, tiled
from oracles import check_operator, within_twice
from select_tokens_cases import case, describe, truth
from timm.models import VisionTransformer
from torch import nn

import vitprune
from vitprune import ops
from vitprune.ops import backend, registry

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("poison")


def arguments(seed: int, large: bool = False, device: str = "cpu"):
    """(x, scores, k, weight, bias, prefix) of that seed: the selection's cases with vectors of any dtype."""
    x, scores, k, prefix = case(seed, large, device)
    x = x.float() if x.dtype == torch.float64 else x
    rng = np.random.default_rng(seed)
    dtype = DTYPES[rng.integers(3)]
    weight, bias = (torch.from_numpy(rng.standard_normal(x.shape[2])).to(dtype).to(device) for _ in range(2))
    return x, scores, k, weight, bias if seed % 4 else None, prefix


def check(name: str, seed: int, config: dict | None = None, **options) -> None:
    """Tokens and ids are the truth, exactly; the norm errs at most twice as much as PyTorch's in that dtype."""
    x, scores, k, weight, bias, prefix = arguments(seed, **options)
    with torch.inference_mode(), backend(name), tiled("select_norm", config or {}):
        tokens, ids, y = ops.select_norm(x, scores, k, weight, bias, 1e-6, prefix=prefix)
    expected, expected_ids = truth(x, scores, k, prefix)
    assert tokens.dtype == y.dtype == x.dtype and ids.dtype == torch.int64 and y.shape == tokens.shape and y.is_contiguous()
    np.testing.assert_array_equal(ids.cpu().numpy(), expected_ids, err_msg=f"ids, seed {seed}")
    np.testing.assert_array_equal(tokens.double().cpu().numpy(), expected, err_msg=f"tokens, seed {seed}")
    wide = [t if t is None else t.double() for t in (tokens, weight, bias)]
    same = [t if t is None else t.to(x.dtype) for t in (weight, bias)]
    with backend("reference"):
        within_twice(y, ops.layer_norm(tokens, *same, 1e-6), ops.layer_norm(*wide, 1e-6))


def test_definition():
    for seed in range(200):
        check("reference", seed)


@pytest.mark.parametrize("count", counts(200, 10_000))
@pytest.mark.parametrize("name, device", kernels("triton"))
def test_kernel(name, device, count):
    configs = {}, {"rows": 1, "tiles": 3}, {"rows": 16, "pairs": 1024}, {"rows": 4, "tiles": 2}
    few = {"pairs": 2 ** 20, "rows": 64} if device == "cpu" else {}  # steps to interpret
    for seed in seeds(count):
        large = seed % 100 == 98
        check(name, seed, device=device, large=large, config=few if large else configs[seed % 4])
    print(describe((x, scores, k, prefix) for x, scores, k, _, _, prefix in map(arguments, seeds(count))))


@pytest.mark.parametrize("name, device", kernels("triton"))
def test_edges(name, device):
    weight, bias = torch.randn(2, 5, device=device)
    for B, N in ((0, 5), (2, 0), (257, 1), (1, 2), (2, 15), (1, 16), (2, 17), (1, 50), (1, 196), (1, 197), (1, 198), (1, 577), (1, 1025)):
        x, scores = torch.randn(B, N + 1, 5, device=device), torch.randint(0, 4, (B, N), device=device).float()
        few = {"pairs": 2 ** 20, "rows": 256} if device == "cpu" and N > 500 else {}  # steps to interpret
        for k in {0, min(1, N), N}:
            with torch.inference_mode():
                with backend(name), tiled("select_norm", few):
                    got = ops.select_norm(x, scores, k, weight, bias, 1e-6)
                with backend("reference"):
                    expected = ops.select_norm(x, scores, k, weight, bias, 1e-6)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
            torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, device", [("reference", "cpu"), *kernels("triton")])
def test_registered(name, device):
    x, scores, weight = torch.randn(2, 6, 3, device=device), torch.randn(2, 5, device=device), torch.randn(3, device=device)
    for bias in (weight, None):
        check_operator(torch.ops.vitprune.select_norm.default, [x, scores, 3, weight, bias, 1e-5, 1, name])


@pytest.mark.parametrize("name, device", kernels("triton"))
def test_triton_refuses(name, device):
    x, scores, w = torch.randn(1, 4, 8, device=device), torch.randn(1, 3, device=device), torch.ones(8, device=device)
    with backend(name):
        with pytest.raises(RuntimeError, match="forward only"):
            ops.select_norm(x, scores, 2, w, None, 1e-6)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="no kernel for torch.float64"):
            ops.select_norm(x.double(), scores, 2, w, None, 1e-6)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="more than the 4,096 patches"):
            ops.select_norm(x.new_zeros(1, 5000, 8), x.new_zeros(1, 4999), 2, w, None, 1e-6)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=5)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
    return dense.eval()


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_of_that_kernel_is_the_same(model, device):
    """Its stages select and normalise in one launch, unless somebody watches the norm or the block."""
    pruned, images = vitprune.prune(model, tokens=vitprune.TokenPruning(0.5, at=(1, 2), score="cls_attention")).to(device).eval(), \
        torch.randn(2, 3, 16, 16, device=device)
    with torch.inference_mode():
        with backend("reference"):
            expected = pruned(images)

        def asked():
            with backend("triton"), registry.watch() as choices:
                torch.testing.assert_close(pruned(images), expected, rtol=1e-3, atol=1e-3)
            return [op for op, *_ in choices if op.startswith("select")]
        assert asked() == ["select_norm"] * 2
        for watched in (pruned.blocks[1].norm1, pruned.blocks[1]):
            seen = []
            hook = watched.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape))
            assert asked() == ["select_tokens", "select_norm"]
            assert seen == [(2, 9, 48)]
            hook.remove()
            watched.forward = lambda *args, own=watched.forward, **options: own(*args, **options)
            assert asked() == ["select_tokens", "select_norm"]
            del watched.forward
    with torch.autocast(torch.device(device).type, torch.bfloat16), torch.no_grad(), registry.watch() as choices:
        pruned(images)
    assert [op for op, *_ in choices if op.startswith("select")] == ["select_tokens"] * 2


@pytest.mark.skipif(INTERPRETED, reason="the compiler is off under the interpreter")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("C", [384, 768, 4096])
def test_triton_compiles(C, dtype, arch, monkeypatch):
    pytest.importorskip("triton")
    from vitprune.kernels import select_norm as kernel
    monkeypatch.setattr(kernel.configs, "capability", lambda device: arch)
    x, scores, weight = torch.empty(8, 197, C, dtype=dtype), torch.empty(8, 196, dtype=dtype), torch.empty(C, dtype=dtype)
    launch, = record(monkeypatch, kernel, lambda: kernel.launch(x, scores, 137, weight, weight, 1e-6, 1))
    built = compile_launch(*launch, arch)
    assert built["spills"] == 0 and built["shared"] <= SHARED[arch]
