"""The training loop: it learns, freezes, groups, diagnoses, and repeats itself bit for bit."""
import warnings
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprune import BlockPruning, Cubic, TokenPruning, prune
from vitprune.digits import TensorLoader
from vitprune.evaluate import evaluate, teach
from vitprune.learned import settle
from vitprune.resume import Checkpoints
from vitprune.step import NonFiniteLoss, Run, parameter_groups, soft_target
from vitprune.train import SCHEDS, TrainConfig, train

CONFIG = TrainConfig(epochs=2, batch_size=16, warmup_epochs=0, backbone_lr_scale=1.0, backbone_frozen_epochs=0,
                     train_embeddings=True)


def vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=3, embed_dim=16, depth=4, num_heads=2)


def pruned():
    return prune(vit(), TokenPruning(0.7, at=(1, 2, 3)), BlockPruning(heads=0.5))


def loaders(count=64):
    """Three classes that differ in how bright the picture is."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.45 * labels[:, None, None, None] + 0.1 * torch.rand(count, 1, 8, 8, generator=random)
    training = TensorLoader(images, labels, 16, mean=0.3, std=0.4, training=True)
    return training, replace(training, training=False)


def test_loss_falls_and_the_classes_are_learned():
    model, data = vit(), loaders()
    before = evaluate(model, data[1])
    history = train(model, data, replace(CONFIG, epochs=12, lr=3e-3, smoothing=0.0))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert before["top1"] < 70 < 95 < history[-1]["top1"] and history[-1]["count"] == 64


def test_training_repeats_bit_for_bit_and_leaves_the_callers_random_state():
    def once():
        model, dense = pruned(), vit()
        train(model, loaders(), CONFIG, dense)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    state = torch.get_rng_state()
    first = once()
    torch.manual_seed(99)
    assert torch.equal(first, once())
    torch.set_rng_state(state)
    expected = torch.rand(1)
    model = vit()
    torch.set_rng_state(state)
    train(model, loaders(), replace(CONFIG, epochs=1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("odds, expected, sure", [(0.0, 0.5, False), (1.0, 0.7311, False), (50.0, 1.0, True), (-50.0, 0.0, True)])
def test_epochs_record_what_is_kept(odds, expected, sure):
    """A fraction of all patches at each stage, and a warning where decisions are too sure to have a gradient."""
    model = prune(vit(), TokenPruning((0.5, 0.25), at=(1, 2)))
    for predictor in model.score_predictor:
        last = predictor.out_conv[4]
        nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([odds, 0.0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        record, = train(model, loaders(192), replace(CONFIG, epochs=1, lr=1e-12, min_lr=0.0))
    draws = 192 * 16  # that are independent
    for stage in (0, 1):
        kept = expected ** (stage + 1)
        assert abs(record[f"keep_{stage}"] - kept) <= 4 * (kept * (1 - kept) / draws) ** 0.5
    found = [str(w.message) for w in said if "too sure" in str(w.message)]
    told = [] if not sure else [0, 1] if expected else [0]  # where nothing is left, later stages decide nothing
    assert len(found) == len(told)
    for stage, text in zip(told, found):
        assert f"epoch 0 stage {stage} kept {expected:.4f} of the patches, its target is {(0.5, 0.25)[stage]:.4f}" in text


def test_a_ramp_that_has_not_begun_is_no_reason_to_warn():
    """Also where a run goes on at the end of an epoch, and from a checkpoint that has no keep_0."""
    blocks = BlockPruning(0.5, method="movement", granularity=16, schedule=Cubic(0.5, 0.3))
    model = prune(vit(), TokenPruning((0.5, 0.25), at=(1, 2)), blocks)
    for totals in ({"loss": 3.0, "keep_0": 3.0, "keep_1": 3.0}, {"loss": 3.0}):
        run = Run(model, replace(CONFIG, epochs=10, ramp_tokens=True), 3)
        run.load_state_dict(run.state_dict() | {"totals": {name: torch.tensor(total) for name, total in totals.items()}})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert run.end_epoch(0, None)["loss"] == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_follows_full_precision(dtype):
    """Weights stay float32; float16 gradients are scaled."""
    def once(amp):
        blocks = BlockPruning(heads=0.5, hidden=0.5, granularity=16, method="movement", schedule=Cubic(0.3, 0.3))
        torch.manual_seed(1)
        model, dense = prune(vit(), TokenPruning(0.7, at=(1, 2, 3)), blocks), vit()
        history = train(model, loaders(192), replace(CONFIG, epochs=4, amp=amp, ramp_tokens=True, ema=0.9), dense)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return model, torch.tensor([[record[name] for name in ("loss", "classification", "ratio", "distillation", "tokens")]
                                    for record in history])

    (_, plain), (model, mixed) = once("off"), once(dtype)
    torch.testing.assert_close(mixed, plain, rtol=0.05, atol=0.02)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_frozen_backbone_keeps_its_bits_and_predictors_learn():
    model = prune(vit(), TokenPruning(0.7, at=(1, 2, 3)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, loaders(), replace(CONFIG, epochs=2, backbone_frozen_epochs=2), vit())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    predictors = {name for name in before if name.startswith("score_predictor.")}
    assert changed <= predictors and len(changed) > len(predictors) / 2
    train(model, loaders(), replace(CONFIG, epochs=2, backbone_frozen_epochs=1), vit())
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])


def test_embeddings_stay_unless_asked_for():
    for asked in (False, True):
        model = vit()
        before = model.cls_token.clone(), model.pos_embed.clone()
        train(model, loaders(), replace(CONFIG, epochs=1, train_embeddings=asked))
        assert torch.equal(before[0], model.cls_token) is not asked
        assert torch.equal(before[1], model.pos_embed) is not asked


def test_every_parameter_is_in_exactly_one_group():
    model = pruned()
    groups = parameter_groups(model, replace(CONFIG, backbone_lr_scale=0.01))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        of_predictor = {names[id(p)].startswith("score_predictor.") for p in group["params"]}
        assert of_predictor == {group["name"] == "predictors"}
        assert group["lr_scale"] == (1.0 if group["name"] == "predictors" else 0.01)
        vectors = {p.ndim <= 1 or names[id(p)] in ("cls_token", "pos_embed") for p in group["params"]}
        assert vectors == {group["weight_decay"] == 0}
    left = {id(p) for p in model.parameters()} - \
        {id(p) for group in parameter_groups(model, replace(CONFIG, train_embeddings=False)) for p in group["params"]}
    assert {names[i] for i in left} == {"cls_token", "pos_embed"}


def test_a_bad_picture_is_named():
    training, _ = loaders()
    training.images[5] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at epoch 0, step \d+; first non-finite: images \(rows \[\d+\]"):
        train(vit(), (training, None), CONFIG)


def test_a_bad_parameter_is_named():
    model = vit()
    with torch.no_grad():
        model.blocks[2].mlp.fc1.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteLoss, match="first non-finite: parameter blocks.2.mlp.fc1.weight"):
        train(model, loaders(), CONFIG)


def test_what_overflows_in_half_precision_is_named():
    model = vit()
    with torch.no_grad():
        model.blocks[2].mlp.fc2.weight.mul_(1e9)
    with pytest.raises(NonFiniteLoss, match="first non-finite: output of module blocks.2.mlp.fc2"):
        train(model, loaders(), replace(CONFIG, amp="float16"))


def test_a_bad_teacher_is_named():
    teacher = vit()
    with torch.no_grad():
        teacher.blocks[1].attn.proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match="first non-finite: the teacher's parameter blocks.1.attn.proj.weight"):
        train(pruned(), loaders(), CONFIG, teacher)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_does_not_wait_for_a_gpu():
    """Nothing is read back but the state of the loss, once the backward pass is queued: the host prepares a step while the GPU is busy."""
    dense = vit().cuda().eval()
    model = prune(dense, TokenPruning(0.7, at=(1, 2, 3))).cuda()
    run = Run(model, replace(CONFIG, clip_grad=1.0, amp="bfloat16"), 4, dense)
    images, labels = (t.pin_memory() for t in next(iter(loaders()[0])))
    for step in range(3):  # the first loads kernels and makes the optimizer's state
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            run.step(step, images, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    run.settle()


@pytest.mark.parametrize("found", ["at once", "a step later", "when saved", "at the end of the epoch"])
def test_a_bad_gradient_is_named(found, tmp_path):
    """On a CPU before the update; on a GPU, which is not waited for, after it, but before the weights are used or saved."""
    model, (images, labels) = vit(), next(iter(loaders()[0]))
    bad = model.blocks[2].mlp.fc1.weight
    run = Run(model, replace(CONFIG, clip_grad=1.0), 2)
    assert run.waits
    run.waits = found == "at once"
    run.step(0, images, labels)
    bad.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), float("nan")))
    named = "gradients are not finite at epoch 0, step 1; first non-finite: norm of the gradient of blocks.2.mlp.fc1.weight"
    if found != "at once":
        run.step(1, images, labels)
    with pytest.raises(NonFiniteLoss, match=named):
        {"at once": lambda: run.step(1, images, labels), "a step later": lambda: run.step(2, images, labels),
         "when saved": lambda: Checkpoints(tmp_path).save(run, 2), "at the end of the epoch": lambda: run.end_epoch(0, None)}[found]()
    assert torch.isfinite(bad).all() == (found == "at once") and not [*tmp_path.iterdir()]


def test_the_moving_average_keeps_what_was_fine_tuned():
    def live(ema):
        model = prune(vit(), blocks=BlockPruning(heads=0.5, hidden=0.5, method="movement", granularity=16, start="zero"))
        train(model, loaders(), replace(CONFIG, epochs=4, ema=ema, score_lr=0.3))
        settle(model)
        return [(b.attn.live.tolist(), b.mlp.live.tolist()) for b in model.blocks]
    assert live(None) == live(0.999)


def test_the_first_bad_module_is_named():
    class Overflow(nn.Module):
        def forward(self, x):
            return x / 0

    model = vit()
    model.blocks[1].norm2 = Overflow()
    with pytest.raises(NonFiniteLoss, match="first non-finite: output of module blocks.1.norm2"):
        train(model, loaders(), CONFIG)


def test_history_has_the_parts_of_the_objective():
    records = []
    history = train(pruned(), loaders(), CONFIG, vit(), on_epoch=records.append)
    assert records == history and [record["epoch"] for record in history] == [0, 1]
    assert {"loss", "classification", "ratio", "distillation", "tokens", "lr"} <= set(history[0])


def test_teacher_speaks_as_the_dense_model_and_takes_no_gradient():
    model, images = vit().eval(), torch.randn(2, 1, 8, 8)
    logits, features = teach(model, images)
    torch.testing.assert_close(logits, model(images))
    assert features.shape == (2, 16, 16) and not logits.requires_grad and not logits.is_inference()


def test_soft_target_sums_to_one():
    target = soft_target(torch.tensor([2]), 4, 0.1)
    torch.testing.assert_close(target, torch.tensor([[0.025, 0.025, 0.925, 0.025]]))


def test_evaluate_counts_by_hand():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale

    logits = torch.eye(8)[[0, 1, 2, 3]] * 10 + torch.arange(8, 0, -1.0)  # ranks: own class first, then 0, 1, 2, ...
    result = evaluate(Fixed(), [(logits[:3], torch.tensor([0, 1, 4])), (logits[3:], torch.tensor([7]))])
    assert result == {"top1": 50.0, "top5": 50.0 + 25.0 * 1, "count": 4}


@pytest.mark.parametrize("field, value", [("epochs", 0), ("lr", 0.0), ("warmup_epochs", 31), ("smoothing", 1.0),
                                          ("clip_grad", 0.0), ("backbone_lr_scale", -1.0), ("sched", "plateau"), ("sched", "none"),
                                          ("opt", "nope"), ("seed", -1)])
def test_config_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"TrainConfig: {field} must be .*, got {value}"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize("sched", SCHEDS)
def test_every_schedule_trains(sched):
    assert all(0 < record["lr"] <= CONFIG.lr for record in train(pruned(), loaders(), replace(CONFIG, sched=sched)))


def test_processes_with_an_odd_share_cannot_mix(monkeypatch):
    monkeypatch.setattr("vitprune.step.world", lambda: (0, 2))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda module: module)
    with pytest.raises(ValueError, match="batch_size must give each of the 2 processes an even share for mixup and cutmix, got 6"):
        Run(pruned(), replace(CONFIG, batch_size=6, mixup=0.8), 5)
