"""The pruned vision transformer: identity, removal, compaction, both kinds of pruning, and timm's interface."""
import copy
import pickle
import threading
import warnings

import pytest
import timm
import torch
from models import UNEVEN, tokens, vit
from timm.optim import create_optimizer_v2
from torch import nn

import vitprune
from vitprune import BlockPruning, PrunedAttention, PrunedMlp, TokenPruning, compact, prune

VARIANTS = {"plain": {}, "layer_scale": {"init_values": 0.1}, "qk_norm": {"qk_norm": True}, "average": {"global_pool": "avg"},
            "no_class_token": {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
            "registers": {"reg_tokens": 3, "no_embed_class": True}, "pre_norm": {"pre_norm": True},
            "any_size": {"dynamic_img_size": True}, "no_qkv_bias": {"qkv_bias": False},
            "prefix_pool": {"global_pool": "avg", "pool_include_prefix": True}}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the token predictors are untrained")
        yield


@pytest.fixture
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_small_distilled_patch16_224", "deit3_small_patch16_224",
                                  "vit_medium_patch16_gap_240", "vit_little_patch16_reg4_gap_256", "vit_small_patch14_reg4_dinov2",
                                  "vit_tiny_r_s16_p8_224", "vit_wee_patch16_reg1_gap_256",
                                  "vit_small_patch32_384", "vit_base_patch32_clip_224"])
@torch.no_grad()
def test_nothing_pruned_is_timm(name):
    torch.manual_seed(0)
    dense = timm.create_model(name, num_classes=10, **({"img_size": 140} if "dinov2" in name else {})).eval()
    size = dense.patch_embed.img_size
    image = torch.randn(1, 3, *size)
    state = {k: v.clone() for k, v in dense.state_dict().items()}
    pruned = prune(dense, TokenPruning(1.0), BlockPruning())
    assert (pruned(image) - dense(image)).abs().max() <= 1e-5
    assert {k for k in pruned.state_dict() if not k.startswith("score_predictor")} == set(state)
    assert all(torch.equal(v, state[k]) for k, v in dense.state_dict().items())  # the argument is untouched
    pruned.load_state_dict(state, strict=False)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("score", ["predictor", "cls_attention", "random", "threshold"])
@torch.no_grad()
def test_tokens_leave_and_compact_is_equal(name, score, x):
    options = VARIANTS[name]
    if score == "cls_attention" and not options.get("class_token", True):
        with pytest.raises(ValueError, match="no class token"):
            prune(vit(**options), tokens(score=score))
        return
    schedule = tokens(threshold=0.5, min_keep=4) if score == "threshold" else tokens(score=score)
    for blocks in (BlockPruning(0.5, 0.5), BlockPruning(0.5, 0.25, method="random"), None if score == "cls_attention" else UNEVEN):
        pruned = prune(vit(**options), schedule, blocks)
        outputs = []
        for model in (pruned, compact(pruned)):
            torch.manual_seed(2)
            outputs.append(model(x))
        assert (outputs[0] - outputs[1]).abs().max() <= 1e-5
    kept = pruned.trace_tokens(x)
    for stage, (ids, k) in enumerate(zip(kept, pruned.keep_counts)):
        if score == "threshold":
            assert ((ids >= 0).sum(1) >= 4).all()
        else:
            assert ids.shape == (3, k) and (ids[:, 1:] > ids[:, :-1]).all()
        if stage:
            assert all(set(a.tolist()) - {-1} <= set(b.tolist()) for a, b in zip(ids, kept[stage - 1]))
    if score != "threshold":
        assert pruned.forward_features(x).shape[1] == pruned.keep_counts[-1] + pruned.num_prefix_tokens < 64


@torch.no_grad()
def test_removal_equals_masking(x):
    """Removing tokens in evaluation is the training policy with the same decisions, as an independent path."""
    pruned = prune(vit(), tokens())
    state, kept = pruned.norm_pre(pruned._pos_embed(pruned.patch_embed(x))), pruned.trace_tokens(x)
    policy = None
    for i, block in enumerate(pruned.blocks):
        if i:
            policy = torch.cat([torch.ones(3, 1), torch.zeros(3, 64).scatter(1, kept[i - 1], 1.0)], 1)
        state = block(state, policy=policy)
    logits = pruned.forward_head(pruned.norm(state))
    assert (logits - pruned(x)).abs().max() < 1e-4  # eps of the official policy softmax: 1e-6 / N of weight leaks


@torch.no_grad()
def test_adaptive_counts_equal_image_by_image(x):
    pruned = prune(vit(global_pool="avg"), tokens(threshold=0.5))
    together = pruned(x)
    alone = torch.cat([pruned(image[None]) for image in x])
    counts = [(ids >= 0).sum(1).tolist() for ids in pruned.trace_tokens(x)]
    assert (together - alone).abs().max() < 1e-5 and len(set(counts[0])) > 1  # the images keep different counts


def test_training_policy(x):
    pruned = prune(vit(), tokens()).train()
    out = pruned(x, details=True)
    assert out.features.shape == (3, 64, 64) and len(out.decisions) == 3
    for before, after in zip(out.decisions, out.decisions[1:]):
        assert ((before - after) >= 0).all() and set(after.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(out.keep, out.decisions[-1]) and not out.keep.requires_grad
    out.logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in pruned.named_parameters() if "head" not in n)
    assert pruned.score_predictor[2].in_conv[1].weight.grad.abs().sum() > 0


def test_masked_heads_and_units_learn_nothing(x):
    pruned = prune(vit(), blocks=BlockPruning(0.5, 0.5)).train()
    pruned(x).square().sum().backward()
    attn, mlp = pruned.blocks[1].attn, pruned.blocks[1].mlp
    dead = [h for h in range(4) if h not in attn.live.tolist()]
    assert not attn.qkv.weight.grad.view(3, 4, 16, 64)[:, dead].any() and attn.qkv.weight.grad.any()
    dead = [i for i in range(4) if i not in mlp.live.tolist()]
    assert not mlp.fc1.weight.grad.view(4, 64, 64)[dead].any() and mlp.fc1.weight.grad.any()


@pytest.mark.parametrize("make", [lambda m: prune(m, tokens(), BlockPruning(0.5, 0.5)), lambda m: prune(m, tokens(score="cls_attention")),
                                  lambda m: compact(prune(m, tokens(), UNEVEN)), lambda m: prune(m, tokens(threshold=0.5))])
@pytest.mark.parametrize("training", [False, True])
def test_compile(make, training, x):
    model = make(vit()).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if training:
        compiled(x).sum().backward()
        assert model.head.weight.grad.isfinite().all()
    else:
        with torch.no_grad():
            assert (compiled(x) - model(x)).abs().max() <= 1e-5


def test_export(x):
    model = prune(vit(), tokens(), BlockPruning(0.5, 0.5))
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    assert not [n for n in program.graph.nodes if "vitprune" in str(n.target)]  # runs where this package is not installed
    with torch.no_grad():
        assert (program.module()(x[:2]) - model(x[:2])).abs().max() <= 1e-5


@torch.no_grad()
def test_details_follow_the_size_of_the_images():
    model = prune(vit(dynamic_img_size=True), tokens())
    for height, width in ((48, 32), (16, 16), (32, 32)):
        out = model(torch.randn(2, 3, height, width), details=True)
        n = height * width // 16
        assert out.keep.shape == (2, n) and (out.keep.sum(1) == model.tokens.counts(n, 1)[-1]).all()


@torch.no_grad()
def test_copies_and_threads(x):
    model = prune(vit(), tokens(), BlockPruning(0.5, 0.5))
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected) and torch.equal(copy.deepcopy(model)(x), expected)
    results = []

    def run():
        with torch.no_grad():
            results.extend(model(x) for _ in range(10))

    threads = [threading.Thread(target=run) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(results) == 80 and all(torch.equal(r, expected) for r in results)


def test_amp_and_checkpointing(x):
    model = prune(vit(), tokens(), BlockPruning(0.5, 0.5)).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, details=True)
    out.logits.float().sum().backward()
    assert out.logits.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_timm_interface(x):
    model = prune(vit(), tokens())
    assert model.no_weight_decay() >= {"cls_token", "pos_embed"}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    model.reset_classifier(7)
    assert model(x).shape == (3, 7)
    with pytest.raises(ValueError, match="no full grid"):
        model.forward_intermediates(x)
    blocks_only = prune(vit(), blocks=BlockPruning(0.5, 0.5))
    assert [t.shape for t in blocks_only.forward_intermediates(x, indices=2, intermediates_only=True)] == [(3, 64, 8, 8)] * 2
    assert blocks_only(x, details=True).keep is None


@torch.no_grad()
def test_either_order_and_again(x):
    dense = vit()
    one, two = prune(prune(dense, tokens()), blocks=BlockPruning(0.5, 0.5)), prune(prune(dense, blocks=BlockPruning(0.5, 0.5)), tokens())
    two.score_predictor.load_state_dict(one.score_predictor.state_dict())
    assert torch.equal(one(x), two(x))
    again = prune(compact(one), blocks=BlockPruning(0.5, 0.5))
    assert [b.attn.live_heads for b in again.blocks] == [1] * 4 and [b.mlp.live_hidden for b in again.blocks] == [64] * 4
    small = compact(again)
    assert (small(x) - again(x)).abs().max() <= 1e-5
    small.train()
    with torch.enable_grad():
        small(x).sum().backward()
    assert small.blocks[0].attn.qkv.weight.shape == (48, 64)


def test_budget_spends_what_it_says(x):
    from vitprune.blocks import count_macs
    for fraction in (0.8, 0.5):
        model = prune(vit(), tokens(), BlockPruning(budget=fraction))
        spent = count_macs(compact(model)) / count_macs(prune(vit(), tokens()))
        assert fraction - 0.04 < spent <= fraction
        assert min(b.attn.live_heads for b in model.blocks) >= 1 and min(b.mlp.live_hidden for b in model.blocks) >= 64


def test_magnitude_keeps_the_largest_and_random_does_not():
    dense = vit()
    dense.blocks[2].mlp.fc1.weight.data[64:128] *= 3
    dense.blocks[1].attn.proj.weight.data[:, 32:48] *= 3
    model = prune(dense, blocks=BlockPruning(0.25, 0.25))
    assert model.blocks[2].mlp.live.tolist() == [1] and model.blocks[1].attn.live.tolist() == [2]
    picks = {tuple(prune(dense, blocks=BlockPruning(0.5, 0.5, method="random", seed=s)).blocks[2].mlp.live.tolist()) for s in range(20)}
    assert len(picks) > 2
    assert prune(dense, blocks=BlockPruning(0.5, 0.5, granularity=1)).blocks[0].mlp.live_hidden == 128


def test_drop_in_modules(x):
    """timm builds its own model from them; alone they are timm's modules, with a policy and live units besides."""
    model = vit(attn_layer=PrunedAttention, mlp_layer=PrunedMlp)
    assert model.state_dict().keys() == vit().state_dict().keys() and model(x).shape == (3, 5)
    assert torch.allclose(model(x), vit()(x), atol=1e-6)
    attn, tokens_ = PrunedAttention(64, num_heads=4, qkv_bias=True, live=[1, 3]), torch.randn(2, 9, 64)
    masked = copy.deepcopy(attn)
    masked.set_live(None)
    masked.proj.weight.data.view(64, 4, 16)[:, [0, 2]] = 0
    assert torch.allclose(attn(tokens_), masked(tokens_), atol=1e-6)
    mask = torch.ones(9, 9).tril().bool()
    assert torch.allclose(attn(tokens_, attn_mask=mask), attn(tokens_, is_causal=True), atol=1e-6)
    with pytest.raises(ValueError, match="attn_mask and is_causal must be off"):
        attn(tokens_, attn_mask=mask, policy=torch.ones(2, 9))
    mlp = PrunedMlp(64, 256, live=[0, 2])
    masked = copy.deepcopy(mlp)
    masked.set_live(None)
    masked.fc2.weight.data.view(64, 4, 64)[:, [1, 3]] = 0
    assert torch.allclose(mlp(tokens_), masked(tokens_), atol=1e-6)


def test_untrained_predictors_warn_once(x):
    model = prune(vit(), tokens())
    with pytest.warns(UserWarning, match="untrained"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        trained = prune(vit(), tokens())
        nn.init.normal_(trained.score_predictor[0].out_conv[4].weight)
        trained(x)


def test_schedules():
    """Official keep counts of 196 patches (geometric and subtractive), float floors included."""
    geometric = {0.9: (176, 158, 142), 0.8: (156, 125, 100), 0.7: (137, 96, 67), 0.6: (117, 70, 42), 0.5: (98, 49, 24), 0.4: (78, 31, 12)}
    subtractive = {0.7: (137, 97, 58), 0.6: (117, 78, 39), 0.5: (98, 58, 19), 0.4: (78, 39, 0)}
    for schedule, table in (("geometric", geometric), ("subtractive", subtractive)):
        for keep, counts in table.items():
            assert tuple(TokenPruning(keep, schedule=schedule, min_keep=0).counts(196, 1)) == counts
    assert TokenPruning([0.7, 97, 0.3]).counts(196, 1) == [137, 97, 58]
    assert TokenPruning(0.7, multiple_of=32).counts(196, 1) == [127, 95, 63]
    assert TokenPruning([100, 50, 25]).ratios(200) == [0.5, 0.25, 0.125]


def test_mid_training_evaluation_keeps_working():
    """Switching between training and evaluation, with random selection drawn anew at every call."""
    model, image = prune(vit(), tokens(score="random")), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        a, b = model.trace_tokens(image), model.trace_tokens(image)
    assert not torch.equal(a[0], b[0])
    assert model.train()(image, details=True).decisions == () and vitprune.PrunedViT is type(model)


def test_few_patches_and_no_pictures_under_a_threshold(x):
    threshold = TokenPruning(0.5, at=(1,), threshold=0.5, min_keep=30)
    assert prune(vit(dynamic_img_size=True), threshold)(x[..., :16, :16]).shape == (3, 5)
    assert [t.shape for t in prune(vit(), threshold).trace_tokens(x[:0])] == [(0, 0)]


def test_details_under_distilled_training_are_refused(x):
    model = prune(timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2), blocks=BlockPruning()).train()
    model.set_distilled_training(True)
    assert len(model(x)) == 2
    with pytest.raises(ValueError, match="PrunedViT: details must be False after set_distilled_training"):
        model(x, details=True)
