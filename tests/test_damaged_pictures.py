"""What is damaged is counted, or refused by name."""
import numpy as np
import pytest
import torch
from pictures import SMALL, collect, encoded, folder, picture, table
from PIL import Image

from vitprune.data import DataConfig, Loader, Pictures, create_eval_loader, create_loaders
from vitprune.sources import decode, open_source


def damaged():
    good, png = encoded(picture(1, (64, 64)), "JPEG", quality=95), encoded(picture(1, (64, 64)))
    return {"empty": b"", "text": b"<html>not found</html>", "head of a JPEG": good[:20], "truncated JPEG": good[:len(good) // 2],
            "truncated PNG": png[:len(png) // 2], "PNG with a wrong byte": png[:60] + bytes([png[60] ^ 255]) + png[61:],
            "noise": np.random.default_rng(0).bytes(500), "head of a GIF": b"GIF89a" + b"\0" * 7}


@pytest.mark.parametrize("kind", list(damaged()))
def test_damaged_pictures(tmp_path, kind):
    folder(tmp_path, ["0", "1"], each=8)
    (tmp_path / "1" / "5.png").write_bytes(damaged()[kind])
    data = DataConfig(str(tmp_path), **SMALL, max_corrupt=0.1)
    training, held_out, _ = create_loaders(data, 4)
    with pytest.warns(UserWarning, match="1 unreadable pictures so far, 1/5.png"):
        batches = collect(training)
    assert len(batches) == 4 and all(len(labels) == 4 for _, labels in batches) and training.corrupt == {"1/5.png"}
    with pytest.raises(ValueError, match="1/5.png must be a picture that can be read"):
        list(held_out)
    with pytest.warns(UserWarning, match="unreadable"):
        left = collect(create_eval_loader(DataConfig(str(tmp_path), **SMALL, skip_corrupt=True), 4))
    assert sum(len(labels) for _, labels in left) == 15


def test_damaged_exif_data_cost_no_picture():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "camera", 72.0  # turned, by whom, at which resolution
    good = encoded(picture(1), "JPEG", exif=exif)
    assert decode(good).size == (24, 30)
    start = good.index(b"Exif")
    for at in range(start, start + len(exif.tobytes())):
        for value in (0, 1, 7, 255):
            assert decode(good[:at] + bytes([value]) + good[at + 1:]).size in ((24, 30), (30, 24))


def test_one_percent_of_eight_kinds_is_counted_and_more_is_refused(tmp_path):
    folder(tmp_path, ["0", "1"], each=400)
    for i, data in enumerate(damaged().values()):
        (tmp_path / str(i % 2) / f"{37 * i}.png").write_bytes(data)
    pictures = Pictures(open_source(str(tmp_path), "train"), DataConfig(**SMALL).transform(True), 100, training=True)
    loader = Loader(pictures, 0, 0.01)
    with pytest.warns(UserWarning, match="unreadable"):
        assert sum(len(labels) for _, labels in loader) == 800
    assert len(loader.corrupt) == 8
    message = r"share of 0.005 \(max_corrupt\) of the 800 pictures may be unreadable, got"
    with pytest.warns(UserWarning, match="unreadable"), pytest.raises(ValueError, match=message):
        list(Loader(pictures, 0, 0.005))


@pytest.mark.parametrize("kind", ["parquet", "stream:parquet"])
def test_missing_cells_and_files_are_unreadable_pictures(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(5)]
    cells += [None, {"bytes": None, "path": "/nowhere/x.png"}, {"bytes": None, "path": None}]
    path = table(tmp_path / "t.parquet", cells, [0, 1] * 4, datasets.ClassLabel(names=["a", "b"]))
    training, _, _ = create_loaders(DataConfig(f"{kind}:{path}", **SMALL, max_corrupt=0.5), 8)
    with pytest.warns(UserWarning, match="3 unreadable"):
        assert [len(labels) for _, labels in training] == [8]
    assert {name[-3:] for name in training.corrupt} == {"[5]", "[6]", "[7]"}


@pytest.mark.parametrize("size", [2, 4])
def test_damaged_pictures_leave_the_batch_the_same_at_any_number_of_processes(tmp_path, size):
    folder(tmp_path, ["0", "1"], each=8)
    for name in ("0/2.png", "1/5.png"):
        (tmp_path / name).write_bytes(b"")
    data = DataConfig(str(tmp_path), **SMALL, max_corrupt=0.5)
    with pytest.warns(UserWarning, match="unreadable"):
        whole, *parts = [collect(create_loaders(data, 4, rank=r, world_size=w)[0]) for w in (1, size) for r in range(w)]
    for n, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([p[n][0] for p in parts]), images) and sum((p[n][1] for p in parts), []) == labels


def test_the_next_readable_picture_of_the_batch_stands_in(tmp_path):
    folder(tmp_path, ["0", "1"], each=4)
    data = DataConfig(str(tmp_path), **SMALL, max_corrupt=0.5)
    before = create_loaders(data, 8)[0]
    order, ((images, _),) = before.pictures.order().tolist(), collect(before)
    name = before.pictures.source.files[order[3]][0]
    (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=name):
        ((other, _),) = collect(create_loaders(data, 8)[0])
    assert torch.equal(other, images[[0, 1, 2, 4, 4, 5, 6, 7]])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_is_one_message(tmp_path, workers):
    folder(tmp_path, ["0", "1"])
    (tmp_path / "1" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match="^evaluation: 1/2.png must be a picture") as error:
        list(create_eval_loader(DataConfig(str(tmp_path), **{**SMALL, "workers": workers}), 2))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("kind", ["parquet", "stream:parquet"])
def test_a_damaged_table_is_one_clear_error(tmp_path, kind):
    pytest.importorskip("datasets")
    (tmp_path / "train.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"train.parquet' must be a dataset with a split 'train' that can be read"):
        create_loaders(DataConfig(f"{kind}:{tmp_path}/train.parquet"), 2)
