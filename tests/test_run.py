"""`vitprune train` from start to saved model: every order of tokens and blocks, from every kind of start."""
import json
import os
import signal
import time
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

import vitprune
from vitprune import BlockPruning, TokenPruning
from vitprune.build import build
from vitprune.data import DataConfig
from vitprune.evaluate import evaluate_source
from vitprune.measure import count
from vitprune.run import RunConfig, _lock, main
from vitprune.train import TrainConfig

ARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 2}
TOKENS = TokenPruning((8, 4), at=(1, 2))
BLOCKS = BlockPruning(heads=0.5, hidden=0.5, method="movement", granularity=16)
TRAIN = TrainConfig(epochs=1, batch_size=500, warmup_epochs=0, backbone_frozen_epochs=0, backbone_lr_scale=1.0)
NAME = "vit_tiny_patch16_224"


def config(output, **changes):
    base = {"model": NAME, "model_args": ARGS, "train": TRAIN, "device": "cpu", "output": str(output)}
    return RunConfig(**(base | changes))


def promised():
    """The MACs of a model that was pruned at once: what `vitprune flops` says."""
    dense = timm.create_model(NAME, num_classes=10, **ARGS)
    halves = BlockPruning(heads=0.5, hidden=0.5, granularity=16)
    return count(vitprune.compact(vitprune.prune(dense, TOKENS, halves)).eval(), (1, 8, 8)).macs


def macs(folder):
    return count(vitprune.load(folder / "model"), (1, 8, 8)).macs


def test_both_orders_and_tandem_from_every_start(tmp_path):
    assert main(config(tmp_path / "dense")) == 0
    dense = {"model": str(tmp_path / "dense" / "model"), "model_args": {}, "teacher": "start"}
    assert main(config(tmp_path / "t", **dense, tokens=TOKENS)) == 0
    assert main(config(tmp_path / "b", **dense, blocks=BLOCKS)) == 0
    tokens, blocks = ({"model": str(tmp_path / one / "model"), "model_args": {}} for one in "tb")
    assert main(config(tmp_path / "tb", **tokens, blocks=BLOCKS, teacher=dense["model"])) == 0
    assert main(config(tmp_path / "bt", **blocks, tokens=TOKENS, teacher="start")) == 0
    tandem = TrainConfig(epochs=1, batch_size=500, warmup_epochs=0, backbone_frozen_epochs=0, ramp_tokens=True)
    assert main(config(tmp_path / "both", **dense, tokens=TOKENS, blocks=BLOCKS, train=tandem)) == 0
    official = vitprune.prune(timm.create_model(NAME, num_classes=10, **ARGS), TOKENS)
    torch.save({"model": official.state_dict()}, tmp_path / "dynamicvit.pth")
    assert main(config(tmp_path / "d", checkpoint=str(tmp_path / "dynamicvit.pth"), tokens=TOKENS, blocks=BLOCKS, teacher="start")) == 0
    assert {name: macs(tmp_path / name) for name in ("tb", "bt", "both", "d")} == dict.fromkeys(("tb", "bt", "both", "d"), promised())


def test_a_dynamicvit_checkpoint_starts_the_run(tmp_path):
    torch.manual_seed(3)
    official = vitprune.prune(timm.create_model(NAME, num_classes=10, **ARGS), TOKENS)
    torch.save({"model": official.state_dict()}, tmp_path / "dynamicvit.pth")
    model, _ = build(config(tmp_path, checkpoint=str(tmp_path / "dynamicvit.pth"), tokens=TOKENS, blocks=BLOCKS), 10)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in official.state_dict().items()) and not model.is_untrained()


def test_a_part_of_a_folder(tmp_path):
    for split in ("train", "val"):
        for label in range(3):
            (tmp_path / split / f"c{label}").mkdir(parents=True)
            for k in range(8):
                Image.new("RGB", (20, 20), (80 * label, 20 * k, 0)).save(tmp_path / split / f"c{label}" / f"{k}.png")
    data = DataConfig(str(tmp_path), image_size=16, workers=0)
    args = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    train = TrainConfig(epochs=1, batch_size=4, warmup_epochs=0)
    half = config(tmp_path / "out", model_args=args, data=data, train=train, fraction=0.5, take="balanced",
                  tokens=TokenPruning(0.5, at=(1,)))
    assert main(half) == 0
    chosen = vitprune.data.read_subset(tmp_path / "out" / "subset.json")
    assert len(chosen) == 12 and [sum(i // 8 == c for i in chosen) for c in range(3)] == [4, 4, 4]
    saved = vitprune.load(tmp_path / "out" / "model")
    assert saved.num_classes == 3 and saved.pretrained_cfg["input_size"] == (3, 16, 16)


def test_a_teacher_does_not_learn_with_its_student(tmp_path):
    assert main(config(tmp_path / "a")) == 0
    again = config(tmp_path / "b", model=str(tmp_path / "a" / "model"), model_args={}, teacher="start")
    model, teacher = build(again, 10)
    assert not set(model.parameters()) & set(teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), teacher.state_dict().values()))


def test_a_teacher_of_another_width_and_grid_teaches_logits(tmp_path):
    wide = ARGS | {"embed_dim": 48, "num_heads": 3, "patch_size": 4}
    assert main(config(tmp_path / "wide", model_args=wide)) == 0
    student = config(tmp_path / "s", tokens=TOKENS, teacher=str(tmp_path / "wide" / "model"))
    with pytest.raises(ValueError, match=r"teacher must have the model's 32 channels and 16 patches .* has 48 and 4$"):
        main(student)
    without = replace(TRAIN, token_weight=0.0)
    assert main(replace(student, train=without)) == 0
    torch.save(timm.create_model("deit_tiny_patch16_224", num_classes=10, **wide).state_dict(), tmp_path / "t.pth")
    named = {"teacher": "deit_tiny_patch16_224", "teacher_checkpoint": str(tmp_path / "t.pth")}
    assert build(config(tmp_path / "n", **named, teacher_args=wide, train=without), 10)[1].embed_dim == 48
    with pytest.raises(ValueError, match="must have the model's 197 positions"):
        build(config(tmp_path / "n", **named, train=without), 10)  # the student's arguments are not another model's


def test_a_teacher_whose_head_would_be_random_is_refused(tmp_path, monkeypatch):
    """timm gives a pretrained model a new head for another number of classes."""
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: make(name, **options))
    start = config(tmp_path, pretrained=True, teacher="start", tokens=TOKENS)
    for run in (start, replace(start, pretrained=False, teacher=NAME)):
        with pytest.raises(ValueError, match="teacher must know the data's 10 classes, the pretrained vit_tiny_patch16_224 knows 1000"):
            build(run, 10)
    build(replace(start, model_args=ARGS | {"num_classes": 1000}), 1000)


def test_classes_in_another_order_are_refused(tmp_path):
    for root, names in (("a", ("cat", "dog", "eel")), ("b", ("ant", "cat", "dog"))):
        for split in ("train", "val"):
            for name in names:
                (tmp_path / root / split / name).mkdir(parents=True)
                Image.new("RGB", (20, 20)).save(tmp_path / root / split / name / "0.png")
    data = DataConfig(str(tmp_path / "a"), image_size=16, workers=0)
    args = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    assert main(config(tmp_path / "out", model_args=args, data=data, train=replace(TRAIN, batch_size=3))) == 0
    model = vitprune.load(tmp_path / "out" / "model")
    assert evaluate_source(model, str(tmp_path / "a"), workers=0)["count"] == 3
    with pytest.raises(ValueError, match="classes of .* must be the model's in its order, got 'ant' where it has 'cat'"):
        evaluate_source(model, str(tmp_path / "b"), workers=0)


def test_refilled_heads_are_fine_tuned_by_the_next_run(tmp_path):
    blocks = replace(BLOCKS, head_dim=0.5)
    assert main(config(tmp_path / "cut", blocks=blocks)) == 0
    assert main(config(tmp_path / "filled", blocks=blocks, refill=True)) == 0
    cut, filled = (vitprune.load(tmp_path / name / "model").blocks[0].attn for name in ("cut", "filled"))
    assert (cut.num_heads, cut.head_dim) == (1, 8) and (filled.num_heads, filled.head_dim) == (1, 16)
    assert main(config(tmp_path / "tuned", model=str(tmp_path / "filled" / "model"), model_args={})) == 0
    with pytest.raises(ValueError, match="refill must be off unless blocks.head_dim is < 1"):
        config(tmp_path, blocks=BLOCKS, refill=True)
    with pytest.raises(ValueError, match="train.ramp_tokens must be off where no tokens are pruned by predictors"):
        config(tmp_path, tokens=replace(TOKENS, score="random"), train=replace(TRAIN, ramp_tokens=True))


def test_a_damaged_configuration_is_one_error(tmp_path):
    assert main(config(tmp_path)) == 0
    for text in ("", "model: [unclosed"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match="config.yaml must be the configuration that the run began with, it is damaged"):
            main(config(tmp_path))


def test_one_run_an_output(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    lock, (told, tell) = _lock(tmp_path), os.pipe()
    if (child := os.fork()) == 0:  # as a loader's worker, which outlives the run
        os.write(tell, b"x")
        time.sleep(20)
        os._exit(0)
    os.read(told, 1)
    del lock
    _lock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="output must not be that of another run that is still going on"):
            main(config(tmp_path))
    assert main(config(tmp_path)) == 0


def test_a_refused_command_leaves_the_run_as_it_was(tmp_path):
    assert main(config(tmp_path)) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="must hold no checkpoints"):
        main(config(tmp_path, resume="never", train=replace(TRAIN, lr=0.5)))
    with pytest.raises(ValueError, match="train.lr must be 0.001"):
        main(config(tmp_path, train=replace(TRAIN, lr=0.5)))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_moving_average_is_what_is_saved(tmp_path, capsys):
    assert main(config(tmp_path, train=replace(TRAIN, epochs=2, ema=0.5))) == 0
    assert "(the moving average)" in capsys.readouterr().out
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["lr"] < 1e-3 and evaluate_source(vitprune.load(tmp_path / "model"), "digits")["top1"] == last["ema_top1"]
    wrong = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    with pytest.raises(ValueError, match="pictures of 8 x 8, it takes 224 x 224"):
        evaluate_source(wrong, "digits")
