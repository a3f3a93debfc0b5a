"""Several processes are one: the same losses at the same global batch, and every held-out picture counted once."""
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from vitprune import BlockPruning, TokenPruning, prune
from vitprune.data import DataConfig, create_loaders
from vitprune.digits import TensorLoader
from vitprune.evaluate import evaluate
from vitprune.resume import Checkpoints
from vitprune.train import Stopped, TrainConfig, train

CONFIG = TrainConfig(epochs=10, batch_size=12, lr=1e-3, warmup_epochs=1, backbone_lr_scale=1.0, backbone_frozen_epochs=0,
                     train_embeddings=True, ramp_tokens=True, eval_every=5)


def vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=3, embed_dim=16, depth=3, num_heads=2)


def loaders(rank, size, count=61):
    """60 of 61 pictures make 5 training batches; 61 held-out pictures are no multiple of anything."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.2 * labels[:, None, None, None] + torch.rand(count, 1, 8, 8, generator=random)
    training = TensorLoader(images, labels, 12, mean=0.3, std=0.4, training=True, rank=rank, world_size=size)
    return training, replace(training, training=False)


def work(rank, size, folder):
    """Train tokens and blocks in tandem with a teacher; write the losses of this process and its records."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    torch.manual_seed(1)
    model = prune(vit(), TokenPruning(0.6, at=(1, 2)), BlockPruning(heads=0.5, hidden=0.5, method="movement", granularity=16))
    losses, data = [], loaders(rank, size)
    history = train(model, data, CONFIG, vit(), checkpoints=Checkpoints(f"{folder}/checkpoints-{size}"),
                    on_step=lambda done, loss: losses.append(loss.item()))
    seen = [row for images, _ in data[1] for row in images.flatten(1).sum(1).tolist()]
    with open(f"{folder}/{size}-{rank}.json", "w") as file:
        json.dump({"losses": losses, "history": history, "seen": seen, "accuracy": evaluate(model, data[1])}, file)
    if size > 1:
        dist.destroy_process_group()


def run(size, folder):
    if size == 1:
        work(0, 1, str(folder))
    else:
        mp.spawn(work, (size, str(folder)), nprocs=size)
    return [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_equal_one(tmp_path, size):
    one, several = run(1, tmp_path)[0], run(size, tmp_path)
    means = torch.tensor([process["losses"] for process in several]).mean(0)
    assert len(means) == 50
    torch.testing.assert_close(means, torch.tensor(one["losses"]), atol=1e-5, rtol=0)
    assert torch.tensor([p["losses"] for p in several]).std(0).mean() > 1e-2  # the processes really had different pictures
    for process in several:
        assert process["accuracy"] == one["accuracy"] and process["accuracy"]["count"] == 61
        for mine, theirs in zip(process["history"], one["history"]):
            assert mine.keys() == theirs.keys() and mine == pytest.approx(theirs, abs=1e-5)
    assert sorted(x for process in several for x in process["seen"]) == sorted(one["seen"]) and len(one["seen"]) == 61
    names = [sorted(p.name for p in (tmp_path / f"checkpoints-{n}").iterdir()) for n in (1, size)]
    assert names[0] == names[1]
    assert Checkpoints(tmp_path / f"checkpoints-{size}").found()[0].name == "step-00000050"


def stop_and_go_on(rank, size, folder):
    """SIGTERM reaches one process in the middle of the second epoch; the run goes on with all; write its records."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    config = replace(CONFIG, epochs=2)
    for stop in (8, None):
        model = prune(vit(), TokenPruning(0.6, at=(1, 2)))

        def on_step(done, loss, last=stop):
            if done == last and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        try:
            history = train(model, loaders(rank, size), config, checkpoints=Checkpoints(f"{folder}/checkpoints"), on_step=on_step)
            assert stop is None
        except Stopped:
            assert stop == 8
    with open(f"{folder}/{size}-{rank}.json", "w") as file:
        json.dump(history, file)
    dist.destroy_process_group()


def test_a_resumed_epoch_reports_the_losses_of_all_processes(tmp_path):
    torch.manual_seed(0)
    whole = train(prune(vit(), TokenPruning(0.6, at=(1, 2))), loaders(0, 1), replace(CONFIG, epochs=2))
    mp.spawn(stop_and_go_on, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        for mine, theirs in zip(json.loads((tmp_path / f"2-{rank}.json").read_text()), whole, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)


def read(rank, size, folder):
    """Two epochs over damaged pictures; write which this process knows of, and the error."""
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    data = DataConfig(f"{folder}/tree", image_size=8, workers=0, max_corrupt=0.2)
    training, _, _ = create_loaders(data, 6, rank=rank, world_size=size)
    found = []
    for limit in (0.2, 0.15):
        training.max_corrupt = limit
        training.corrupt.clear()
        try:
            found.append(len(list(training)) and sorted(training.corrupt))
        except ValueError as error:
            found.append(str(error))
    with open(f"{folder}/{size}-{rank}.json", "w") as file:
        json.dump(found, file)
    if size > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.filterwarnings("ignore:data. ")
def test_unreadable_pictures_are_counted_over_all_processes(tmp_path, size):
    for split in ("train", "val"):
        for i in range(36):
            path = tmp_path / "tree" / split / str(i % 3) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (7 * i, 0, 0)).save(path)
            if i % 6 == 0:
                path.write_bytes(b"")
    if size == 1:
        read(0, 1, str(tmp_path))
    else:
        mp.spawn(read, (size, str(tmp_path)), nprocs=size)
    for rank in range(size):
        known, error = json.loads((tmp_path / f"{size}-{rank}.json").read_text())
        assert known == sorted(f"0/{i}.png" for i in range(0, 36, 6))
        assert "at most a share of 0.15 (max_corrupt) of the 36 pictures may be unreadable, got 6" in error


def headless(rank, size, folder):
    """Three steps of a model of which one layer has no live head."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    model = prune(vit(), blocks=BlockPruning(heads=[0, 0.5, 1], hidden=[1, 0, 0.5], granularity=16))
    history = train(model, loaders(rank, size), replace(CONFIG, epochs=1))
    with open(f"{folder}/{size}-{rank}.json", "w") as file:
        json.dump(history, file)
    dist.destroy_process_group()


def test_a_layer_without_heads_trains_in_several_processes(tmp_path):
    model = prune(vit(), blocks=BlockPruning(heads=[0, 0.5, 1], hidden=[1, 0, 0.5], granularity=16))
    history = train(model, loaders(0, 1), replace(CONFIG, epochs=1))
    mp.spawn(headless, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"2-{rank}.json").read_text())[0] == pytest.approx(history[0], abs=1e-5)
