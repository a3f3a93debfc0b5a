"""Parameters and MACs: two counters, a closed form, and the published figures."""
import warnings
from math import prod

import pytest
import timm
import torch
from torch import nn

import vitprune
from vitprune import BlockPruning, TokenPruning, measure
from vitprune.measure import CountError, count
from vitprune.ops.registry import MACS, TABLES


def closed_form(C=768, H=12, F=3072, depth=12, patches=196, prefix=1, patch=16, classes=1000, at=(), keep=(), predictor=True):
    """MACs of a vision transformer: (matrix products and convolution, LayerNorms at 5 an element), from the layer sizes."""
    A, n, products, norms = H * 64, patches + prefix, patches * 3 * patch * patch * C, 0
    for i in range(depth):
        if i in at:
            before = n - prefix
            if predictor:
                products += before * (C * C + C * C // 2 + C // 2 * (C // 4) + C // 4 * 2)
                norms += 5 * before * C
            n = keep[at.index(i)] + prefix
        products += n * (4 * C * A + 2 * C * F) + 2 * n * n * A
        norms += 2 * 5 * n * C
    return products + C * classes, norms + 5 * n * C


KEEPS = {("geometric", .9): (176, 158, 142), ("geometric", .8): (156, 125, 100), ("geometric", .7): (137, 96, 67),
         ("geometric", .6): (117, 70, 42), ("geometric", .5): (98, 49, 24), ("geometric", .4): (78, 31, 12),
         ("subtractive", .9): (176, 137, 98), ("subtractive", .8): (156, 117, 78), ("subtractive", .7): (137, 97, 58),
         ("subtractive", .6): (117, 78, 39), ("subtractive", .5): (98, 58, 19), ("subtractive", .4): (78, 39, 0)}
PUBLISHED = {("geometric", .9): 15.531, ("geometric", .8): 13.339, ("geometric", .7): 11.489, ("geometric", .6): 9.879,
             ("geometric", .5): 8.571, ("geometric", .4): 7.447, ("subtractive", .9): 14.051, ("subtractive", .8): 12.666,
             ("subtractive", .7): 11.316, ("subtractive", .6): 9.997, ("subtractive", .5): 8.668, ("subtractive", .4): 7.371}


@pytest.fixture(scope="module")
def deit_b():
    return timm.create_model("deit_base_patch16_224").eval()


def test_dense(deit_b):
    c = count(deit_b)
    assert (c.params, c.macs) == (86_567_656, 17_582_740_224)
    assert (c.macs_matmul, c.macs - c.macs_matmul) == closed_form()


@pytest.mark.parametrize(("schedule", "keep"), KEEPS)
def test_token_pruned(schedule, keep):
    with torch.device("meta"):  # counts need no weights
        model = timm.create_model("deit_base_patch16_224").eval()
        pruned = vitprune.prune(model, tokens=TokenPruning(keep, schedule=schedule, min_keep=0)).eval()
    c = count(pruned)
    assert c.params == 89_452_846
    assert round(c.macs / 1e9, 3) == PUBLISHED[schedule, keep]
    assert (c.macs_matmul, c.macs - c.macs_matmul) == closed_form(at=(3, 6, 9), keep=KEEPS[schedule, keep])


def test_parts_of_geometric_07(deit_b):
    c = count(vitprune.prune(deit_b, tokens=TokenPruning(0.7)))
    norm = sum(kinds.pop("layer_norm", 0) for kinds in c.by_module.values())
    parts = {name: sum(kinds.values()) for name, kinds in c.by_module.items()}
    assert parts == {"patch_embed": 115_605_504, "blocks": 10_948_082_688, "score_predictor": 411_345_792, "norm": 0, "head": 768_000}
    assert norm == c.by_kind["layer_norm"] == 13_428_480
    assert c.macs == 11_489_230_464


@pytest.mark.parametrize(("tokens", "params", "macs"), [(None, 44.07, 8.859), (0.7, 46.95, 6.015)])
def test_block_pruned(deit_b, tokens, params, macs):
    tokens = tokens and TokenPruning(tokens)
    masked = vitprune.prune(deit_b, tokens=tokens, blocks=BlockPruning(0.5, 0.5))
    small = vitprune.compact(masked)
    c, m = count(small), count(masked)
    assert (round(c.params / 1e6, 2), round(c.macs / 1e9, 3)) == (params, macs)
    stages = {"at": (3, 6, 9), "keep": (137, 96, 67)} if tokens else {}
    assert (c.macs_matmul, c.macs - c.macs_matmul) == closed_form(H=6, F=1536, **stages)
    assert m.macs == c.macs  # what is masked does not run ...
    removed = 12 * (4 * 384 * 768 + 3 * 384 + 2 * 1536 * 768 + 1536)
    assert m.params == c.params + removed  # ... but exists


@pytest.mark.parametrize("score", ["cls_attention", "random"])
def test_other_scores(score):
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224").eval()
        c = count(vitprune.prune(model, tokens=TokenPruning(0.7, score=score)).eval())
    products, norms = closed_form(at=(3, 6, 9), keep=(137, 96, 67), predictor=False)
    if score == "cls_attention":  # the class token's query against every key, once a stage
        products += 768 * sum(n + 1 for n in (196, 137, 96))
    assert (c.macs_matmul, c.macs - c.macs_matmul) == (products, norms)


def test_fused_attention_is_counted():
    from timm.layers import set_fused_attn

    fused = count(timm.create_model("deit_tiny_patch16_224").eval())
    set_fused_attn(False)
    try:
        plain = count(timm.create_model("deit_tiny_patch16_224").eval())
    finally:
        set_fused_attn(True)
    assert "scaled_dot_product_attention" in fused.by_kind
    assert "scaled_dot_product_attention" not in plain.by_kind
    assert fused.macs == plain.macs


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "efficientnet_b0"])
def test_convolutional_networks(name):
    """The third truth: layer sizes seen by hooks."""
    model, total = timm.create_model(name).eval(), 0

    def add(module, args, out):
        nonlocal total
        total += out.numel() * prod(module.weight.shape[1:])

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    c = count(model)
    assert c.macs_matmul == total
    assert c.params == sum(p.numel() for p in model.parameters())


class _Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.patches = function, nn.Conv2d(3, 192, 4, 4)

    def forward(self, images):
        return self.function(self.patches(images).flatten(2).transpose(1, 2))  # [B, 64, 192]


ops, live = torch.ops.vitprune, torch.tensor([0, 2], dtype=torch.int32)


def _ones(x, *shape):
    return torch.ones(shape, device=x.device)


OPERATORS = {
    "short_attention": (lambda x: ops.short_attention(x, 1, None, 0, 0.125, "reference"), 2 * 64 * 64 * 64),
    "policy_attention": (lambda x: ops.policy_attention(*([x.reshape(1, 64, 3, 64).transpose(1, 2)] * 3), _ones(x, 1, 64), 0.125, 1e-6,
                                                        "reference")[0], 2 * 3 * 64 * 64 * 64),
    "sliced_linear": (lambda x: ops.sliced_linear(x, _ones(x, 256, 192), None, live.to(x.device), "out", 64, "reference"),
                      64 * 128 * 192),
    "sliced_mlp": (lambda x: ops.sliced_mlp(x, _ones(x, 256, 192), None, _ones(x, 192, 256), None, live.to(x.device), None, 64,
                                            "reference"), 64 * 128 * (192 + 192)),
    "add_norm": (lambda x: ops.add_norm(x, x, _ones(x, 192), None, None, 1e-6, "reference")[1], 0),
    "select_tokens": (lambda x: ops.select_tokens(x, x[:, 1:, 0], 5, 1, "reference")[0], 0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_registered_operators(name):
    function, macs = OPERATORS[name]
    c = count(_Calls(function).eval(), (3, 32, 32))
    assert c.macs_matmul - 64 * 192 * 48 == macs
    assert c.macs - c.macs_matmul == (5 * 64 * 192 if name == "add_norm" else 0)


def test_every_operator_has_a_formula():
    assert {op for op in TABLES if hasattr(torch.ops.vitprune, op)} == set(TABLES) <= set(MACS)


def test_an_operator_nobody_counts_is_an_error():
    library = torch.library.Library("vitprune_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("vitprune_test::twice", lambda x: torch.empty_like(x), lib=library)
    with pytest.raises(CountError, match=r"vitprune_test\.twice\.default has no known cost"):
        count(_Calls(torch.ops.vitprune_test.twice).eval(), (3, 32, 32))


def test_an_aten_operator_nobody_counts_is_an_error():
    with pytest.raises(CountError, match="linalg_inv_ex.default has no known cost"):
        count(_Calls(lambda x: torch.linalg.inv(x @ x.transpose(1, 2))).eval(), (3, 32, 32))


def test_disagreement_is_an_error(monkeypatch):
    monkeypatch.setattr(measure, "_attention", lambda inputs, outputs: 1)
    with pytest.raises(CountError, match="torch counts .* and fvcore"):
        count(timm.create_model("test_vit").eval())


def test_refusals():
    model = timm.create_model("test_vit")
    with pytest.raises(ValueError, match=r"model must be in evaluation mode"):
        count(model)
    model.eval().blocks[1].train()
    with pytest.raises(ValueError, match=r"blocks\.1 is in training mode"):
        count(model)
    adaptive = vitprune.prune(model.eval(), tokens=TokenPruning(0.7, at=(1, 2), threshold=0.5)).eval()
    with pytest.raises(ValueError, match="threshold the cost depends on the image"):
        count(adaptive)
    with pytest.raises(ValueError, match=r"input_size must be \(channels, height, width\)"):
        count(model, (3, 32))
    with pytest.raises(ValueError, match="input_size must be given"):
        count(nn.Sequential(nn.Linear(2, 2)).eval())


def test_the_model_is_untouched():
    model = vitprune.prune(timm.create_model("test_vit"), tokens=TokenPruning(0.7, at=(1, 2, 3))).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.warns(UserWarning, match="untrained"):  # still to come
        model(torch.randn(1, 3, 160, 160))
