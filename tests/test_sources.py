"""Every source gives the same pictures, labels and batches."""
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pictures import SMALL, collect, encoded, folder, picture, same, table
from PIL import Image

import vitprune
from vitprune.data import DataConfig, create_eval_loader, create_loaders
from vitprune.evaluate import evaluate_source, preprocessing
from vitprune.sources import class_ids, decode, open_source
from vitprune.subset import read_subset, subset_ids, write_subset


@pytest.fixture
def forms(tmp_path):
    """The same 36 pictures of 12 classes as a folder, as parquet, and as a stream of that."""
    datasets = pytest.importorskip("datasets")
    names = [str(i) for i in range(12)]
    rows = folder(tmp_path / "tree" / "train", names)
    folder(tmp_path / "tree" / "val", names)
    for split in ("train", "val"):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        table = datasets.Dataset.from_dict({"image": [{"bytes": d, "path": None} for d, _ in rows], "label": [n for _, n in rows]},
                                           features=features)
        table.to_parquet(tmp_path / f"{split}-0.parquet")
    return [str(tmp_path / "tree"), f"parquet:{tmp_path}", f"stream:parquet:{tmp_path}"]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_source_gives_the_same_batches(forms, workers):
    results = []
    for source in forms:
        training, held_out, classes = create_loaders(DataConfig(source, **{**SMALL, "workers": workers}, window=10), 8, seed=3)
        assert classes == 12 and len(training) == 4
        results.append([collect(training.at_epoch(e)) for e in (0, 1)] + [collect(held_out)])
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other))
    epochs = results[0]
    assert not same(epochs[0], epochs[1])
    assert sum(len(labels) for _, labels in epochs[2]) == 36 and sorted(sum((b for _, b in epochs[2]), [])) == sorted([*range(12)] * 3)


def test_what_systems_leave_beside_pictures_is_no_picture(tmp_path):
    folder(tmp_path, ["cat", "dog"])
    before = open_source(str(tmp_path), "train")
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    for place in ("cat", "__MACOSX/cat"):
        (tmp_path / place / "._0.jpg").write_bytes(b"no picture")
    after = open_source(str(tmp_path), "train")
    assert list(after.names) == ["cat", "dog"] and after.files == before.files


@pytest.mark.parametrize("form", [0, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_every_batch_without_repeats_or_gaps(forms, form, size):
    data = DataConfig(forms[form], **SMALL, window=10)
    whole = create_loaders(data, 6)
    parts = [create_loaders(data, 6, rank=r, world_size=size) for r in range(size)]
    for k in (0, 1):
        pieces = [collect(p[k]) for p in parts]
        for n, (images, labels) in enumerate(collect(whole[k])):
            assert torch.equal(torch.cat([p[n][0] for p in pieces]), images) and sum((p[n][1] for p in pieces), []) == labels


@pytest.mark.parametrize("form", [0, 1, 2])
def test_an_epoch_continues_in_its_middle(forms, form):
    training, _, _ = create_loaders(DataConfig(forms[form], **SMALL), 8)
    assert same(collect(training.at_epoch(1))[2:], collect(training.at_epoch(1, 2)))


def test_numbered_folders_evaluate_like_wordnet_ids(tmp_path):
    wordnet = {"n01443537": 1, "n02129165": 291, "n02099601": 207, "n01440764": 0}
    folder(tmp_path / "a", list(wordnet))
    folder(tmp_path / "b", [str(i) for i in wordnet.values()])
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, pretrained_cfg_overlay={"input_size": (3, 32, 32)}).eval()
    labels = [torch.cat([y for _, y in create_eval_loader(DataConfig(str(tmp_path / d), **SMALL))]).tolist() for d in "ab"]
    assert labels[0] == labels[1] == sorted([*wordnet.values()] * 3)
    one, other = (evaluate_source(model, str(tmp_path / d), workers=0) for d in "ab")
    assert one == other and one["count"] == 12


def test_classes_by_name():
    assert class_ids(["10", "2", "0"], None, "x") == ({"10": 10, "2": 2, "0": 0}, None)
    assert class_ids(["dog", "cat"], None, "x") == ({"cat": 0, "dog": 1}, ["cat", "dog"])
    ids, names = class_ids(["n02129165"], None, "x")
    assert ids == {"n02129165": 291} and len(names) == 1000
    for bad, message in ((["n02129165", "cat"], "all WordNet ids"), (["1", "cat"], "all numbers"), (["1", "01"], "differ as numbers")):
        with pytest.raises(ValueError, match=message):
            class_ids(bad, None, "x")
    with pytest.raises(ValueError, match="lacks 'cat'"):
        class_ids(["cat"], {"dog": 0}, "x")


@pytest.mark.parametrize("name, resize", [("deit_tiny_patch16_224", 256), ("deit_base_distilled_patch16_384", 384),
                                          ("vit_tiny_patch16_224", 248), ("vit_small_patch16_384", 384)])
def test_pictures_are_resized_as_published(name, resize):
    """DeiT's figures are at 256 (a crop of 0.875), others as timm's configuration says, which rounds down."""
    model = timm.create_model(name)
    for m in (model, vitprune.prune(model, tokens=vitprune.TokenPruning(0.7))):
        assert preprocessing(m, "").resize == resize and preprocessing(m, "", 400).resize == 400


def test_every_size_is_the_one_asked_for():
    """timm takes a share and rounds down: 224 / (224 / 400) is less than 400."""
    for size in range(224, 500):
        assert DataConfig(source="", resize=size).transform(False).transforms[0].size == size


def test_classes_that_are_not_the_models_are_refused(tmp_path):
    folder(tmp_path / "a", ["cat", "dog"])
    folder(tmp_path / "b", ["7", "1000"])
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, pretrained_cfg_overlay={"input_size": (3, 32, 32)}).eval()
    with pytest.raises(ValueError, match="must be the model's 1000, got 2"):
        evaluate_source(model, str(tmp_path / "a"))
    with pytest.raises(ValueError, match="labels must be in 0..999, the model's classes, got 1000"):
        evaluate_source(model, str(tmp_path / "b"), workers=0)
    (tmp_path / "map.json").write_text(json.dumps({"cat": 281, "dog": 207}))
    assert evaluate_source(model, str(tmp_path / "a"), workers=0, class_map=str(tmp_path / "map.json"))["count"] == 6


def test_every_kind_of_picture_becomes_upright_rgb():
    grey16 = Image.fromarray((np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4))
    assert np.asarray(decode(encoded(grey16)))[..., 0].flatten().tolist() == [17 * i for i in range(16)]
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert decode(encoded(red.convert("P"))).getpixel((3, 3)) == (255, 0, 0)
    r, g, b = decode(encoded(red.convert("CMYK"), "JPEG")).getpixel((3, 3))
    assert r > 240 and g < 15 and b < 15
    tall, exif = picture(0, (30, 20)), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = decode(encoded(tall, "PNG", exif=exif))
    assert turned.size == (30, 20) and np.array_equal(np.asarray(turned), np.rot90(np.asarray(tall), -1))
    assert decode(encoded(picture(0).convert("L"))).mode == "RGB"


@pytest.mark.parametrize("policy, darkest", [("rand-m9-mstd0.5-inc1", 0), ("rand-m9", 240), ("v0", 240), ("augmix-m5", 0)])
def test_every_level_of_augmentation_gives_a_picture(policy, darkest):
    """timm's Posterize keeps 0 bits at one end of its levels: a black picture, which newer versions of Pillow refuse."""
    transform = pickle.loads(pickle.dumps(DataConfig(**SMALL, auto_augment=policy).transform(True)))  # as a worker may get it
    ops = [op for step in transform.transforms for op in itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ()))]
    ops = [op for op in ops if op.name.startswith("Posterize")]
    for op in ops:
        op.prob, op.magnitude_std, seen = 1.0, 0, []
        for op.magnitude in range(11):
            seen.append(int(np.asarray(op(picture(1))).max()))
        assert min(seen) == 0 and max(seen) == 240 and seen[-1] == darkest
    assert ops


def test_held_out_pictures_that_are_trained_on_are_pointed_out(tmp_path, forms):
    folder(tmp_path / "flat", ["0", "1"])
    alone = ("parquet:" + str(tmp_path / "train-0.parquet"), str(tmp_path / "flat"))
    for source in alone:
        with pytest.warns(UserWarning, match="held-out pictures are those that are trained on"):
            create_loaders(DataConfig(source, **SMALL), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in forms:
            create_loaders(DataConfig(source, **SMALL), 2)


def test_val_and_validation_stand_for_each_other(tmp_path, forms):
    for split, name in (("train", "train"), ("val", "validation")):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / f"{split}-0.parquet", tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    (tmp_path / "tree" / "val").rename(tmp_path / "tree" / "validation")
    (tmp_path / "val-0.parquet").rename(tmp_path / "validation-0.parquet")
    first = next(iter(create_eval_loader(DataConfig(forms[0], **SMALL), 5)))
    (tmp_path / "tree" / "validation").rename(tmp_path / "tree" / "val")
    shutil.move(tmp_path / "validation-0.parquet", tmp_path / "val-0.parquet")
    for source in (forms[0], forms[1], f"hf:{tmp_path / 'hub'}", f"stream:{tmp_path / 'hub'}"):
        for split in ("val", "validation"):
            length = {"length": 36} if source.startswith("stream") else {}
            data = DataConfig(source, **SMALL, eval_split=split)
            got = next(iter(create_eval_loader(data, 5, source=open_source(source, split, **length))))
            assert all(torch.equal(a, b) for a, b in zip(first, got)), (source, split)


def test_subsets(tmp_path):
    labels = [i % 10 if i < 900 else 0 for i in range(1000)]
    assert subset_ids(labels, 0.1) == list(range(100))
    random = subset_ids(labels, 0.1, "random", seed=1)
    assert len(set(random)) == 100 and random == sorted(random) != subset_ids(labels, 0.1, "random", seed=2)
    counts = np.bincount([labels[i] for i in subset_ids(labels, 0.1, "balanced")])
    assert counts.tolist() == [19] + [9] * 9
    write_subset(tmp_path / "s.json", random, 1000)
    assert read_subset(tmp_path / "s.json") == random
    folder(tmp_path / "tree", ["0", "1"])
    write_subset(tmp_path / "s.json", [0, 4], 6)
    training, _, _ = create_loaders(DataConfig(str(tmp_path / "tree"), **SMALL, subset=str(tmp_path / "s.json")), 2)
    assert sorted(sum((y for _, y in collect(training)), [])) == [0, 1]
    with pytest.raises(ValueError, match="how must be first, random or balanced"):
        subset_ids(labels, 0.1, "last")


@pytest.mark.parametrize("source, message", [
    ("/nowhere", "must be a folder with one folder of pictures a class"),
    ("parquet:/nowhere", r"must be a parquet file or a folder with files train\*")])
def test_missing_sources(source, message):
    with pytest.raises(FileNotFoundError, match=message):
        create_loaders(DataConfig(source), 2)


def test_a_stream_that_is_shorter_than_it_says(forms):
    training, _, _ = create_loaders(DataConfig(forms[2], **SMALL, length=40), 8)
    with pytest.raises(ValueError, match="must hold 40 pictures, it ended before number 36"):
        list(training)


@pytest.mark.parametrize("kind", ["parquet", "stream:parquet"])
@pytest.mark.parametrize("names", [["0", "1", "10", "11", "2"], ["n02129165", "n01440764"], ["zebra", "ant"]])
def test_declared_classes_mean_what_they_mean_in_a_folder(tmp_path, kind, names):
    datasets = pytest.importorskip("datasets")  # its own folder reader declares integer names in lexical order
    truth = {"n02129165": 291, "n01440764": 0, "zebra": 0, "ant": 1, **{str(i): i for i in range(12)}}
    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(len(names))]
    path = table(tmp_path / "t.parquet", cells, list(range(len(names))), datasets.ClassLabel(names=names))
    source = open_source(f"{kind}:{path}", "train")
    assert source.labels() == [label for _, label, _ in source.records(range(len(names)))] == [truth[n] for n in names]


@pytest.mark.parametrize("kind", ["parquet", "stream:parquet"])
def test_a_hidden_label_is_refused(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(2)]
    path = table(tmp_path / "t.parquet", cells, [0, -1], datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match="column label of .* must hold class ids >= 0 or names of classes, got -1"):
        list(create_eval_loader(DataConfig(f"{kind}:{path}", **SMALL), 2))


@pytest.mark.parametrize("form", [0, 1, 2])
def test_batches_that_are_skipped_are_not_decoded(forms, form, monkeypatch):
    count = []
    monkeypatch.setattr("vitprune.data.decode", lambda data: count.append(1) or decode(data))
    training, _, _ = create_loaders(DataConfig(forms[form], **SMALL), 8)
    assert len(collect(training.at_epoch(0, 3))) == 1 and len(count) == 8


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no sigwaitinfo: a worker cannot tell who ends it")
def test_workers_outlive_signals_to_all_processes_but_not_their_own(tmp_path):
    """A scheduler signals all processes of a run: the main one still gets its batches, and can end its workers."""
    folder(tmp_path, [str(i) for i in range(20)])
    batches = iter(create_eval_loader(DataConfig(str(tmp_path), **{**SMALL, "workers": 2}), 2))
    next(batches), next(batches)  # both have begun
    workers = multiprocessing.active_children()
    for number in ("-TERM", "-INT", "-TERM"):
        subprocess.run(["kill", number, *(str(worker.pid) for worker in workers)], check=True)  # another process than their own
    assert len(list(batches)) == 28 and len(workers) == 2
    batches = iter(create_eval_loader(DataConfig(str(tmp_path), **{**SMALL, "workers": 1}), 2))
    next(batches)
    worker, = multiprocessing.active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_splits_are_never_taken_for_classes(tmp_path):
    for split in ("train", "test"):
        folder(tmp_path / split, ["cat", "dog"])
    with pytest.raises(FileNotFoundError, match="must hold the split 'val', got .* with train, test"):
        create_loaders(DataConfig(str(tmp_path), **SMALL), 2)
    _, held_out, classes = create_loaders(DataConfig(str(tmp_path), **SMALL, eval_split="test"), 2)
    assert classes == 2 and sum(len(labels) for _, labels in held_out) == 6


@pytest.mark.parametrize("text, message", [
    ("nonsense", "must hold JSON"), ("[1, 2]", "must hold JSON"), ('{"count": 6}', "must hold JSON"),
    ('{"count": 6, "ids": ["0"]}', "must hold JSON"), ('{"count": 999, "ids": [0, 1]}', "one of the source's 6 pictures, got one of 999"),
    ('{"count": 6, "ids": [0, 1, 1]}', "each number once, got 1 repeated"), ('{"count": 6, "ids": [0, 6]}', "numbers in 0..5")])
def test_subsets_of_other_pictures_are_refused(tmp_path, text, message):
    folder(tmp_path / "tree", ["0", "1"])
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        create_loaders(DataConfig(str(tmp_path / "tree"), **SMALL, subset=str(tmp_path / "s.json")), 2)


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"cat": "1"}', '{"cat": -1}', "{}"])
def test_class_maps_that_are_none(tmp_path, text):
    folder(tmp_path / "tree", ["cat"])
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ValueError, match="class_map must be a JSON file"):
        create_loaders(DataConfig(str(tmp_path / "tree"), **SMALL, class_map=str(tmp_path / "m.json")), 2)


@pytest.mark.parametrize("name, value", [("auto_augment", "garbage"), ("auto_augment", "rand-m9-zz5"), ("interpolation", "garbage"),
                                         ("interpolation", "random"), ("reprob", 3.0),
                                         ("color_jitter", -3.0), ("workers", 10 ** 5), ("scale", (0.9, 0.1))])
def test_a_transform_that_timm_does_not_know_is_refused(name, value):
    with pytest.raises(ValueError, match=f"DataConfig: {name} must be .*, got '?{re.escape(str(value))}'?"):
        DataConfig("folder", **{name: value}).transform(training=True)


def test_options_without_effect_are_refused(tmp_path):
    folder(tmp_path, ["cat"])
    with pytest.raises(ValueError, match="image_key must be None where no source has columns, got img"):
        DataConfig(str(tmp_path), image_key="img")
    with pytest.raises(ValueError, match="length must be None except for a stream, got 5"):
        create_loaders(DataConfig(str(tmp_path), length=5), 2)


real = pytest.mark.skipif("VITPRUNE_DATA" not in os.environ, reason="VITPRUNE_DATA is not set")


@real
def test_a_thousand_numbered_folders_evaluate_like_wordnet_folders(tmp_path):
    root = Path(os.environ["VITPRUNE_DATA"]) / "imagenet-sample"
    wordnet = sorted(p.name for p in root.iterdir() if p.is_dir())
    assert len(wordnet) == 1000
    for number, name in enumerate(wordnet):
        (tmp_path / str(number)).symlink_to(root / name)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, pretrained_cfg_overlay={"input_size": (3, 32, 32)}).eval()
    results = [evaluate_source(model, str(place), workers=0) for place in (root, tmp_path)]
    labels = [open_source(str(place), "val").labels() for place in (root, tmp_path)]
    assert labels[0] == labels[1] == list(range(1000)) and results[0] == results[1] and results[0]["count"] == 1000


@real
@pytest.mark.parametrize("split, count", [("train", 50_000), ("test", 8_000)])
def test_cifar10_streams_the_batches_it_reads(split, count):
    pytest.importorskip("datasets")
    path = f"parquet:{os.environ['VITPRUNE_DATA']}/cifar10"
    one, other = (create_loaders(DataConfig(p, train_split=split, eval_split=split, image_size=32, workers=0, window=200), 50)
                  for p in (path, f"stream:{path}"))
    assert one[2] == other[2] == 10 and len(one[0]) == len(other[0]) == count // 50
    for k in (0, 1):
        for _, (a, la), (b, lb) in zip(range(6), one[k], other[k]):
            assert torch.equal(a, b) and torch.equal(la, lb)
