"""Table 1: its true figures are what counting gives, its footnotes what the figures say."""
import json

import pytest
import timm
import torch

import vitprune
from vitprune import table1
from vitprune.measure import count
from vitprune.table1 import DEIT, NOTES, ROWS, Row

BY_NAME = {row.name: row for row in ROWS}


@pytest.mark.parametrize("row", [r for r in ROWS if r.model and "heads" not in dict(r.options)], ids=lambda r: r.name)
def test_true_figures_are_what_counting_gives(row):
    with torch.device("meta"):  # counts need no weights
        model = table1.make(row)
    c = count(model)
    assert (round(c.params / 1e6, 3), round(c.macs / 1e9, 3)) == row.true[:2]


def test_all_rows_are_there():
    assert list(BY_NAME) == [
        "ViT-Base", "DeiT-Base/16", "EfficientFormer-L1", "EfficientFormer-L3", "EfficientFormer-L7", "DynamicViT-B/0.7",
        "DyViT-Sub/0.7", "DyViT-Sub/0.6", "DyViT-Sub/0.5", "DyViT-Sub/0.4", "DeiT-B, half blocks", "DeiT-B, half blocks, tokens 0.7",
        "ResNet-152", "EfficientNet-B0", "MobileNetV3-L", "MobileViTv3-0.5", "SkipblockNet-L", "VTP, DeiT-B"]
    assert {n for r in ROWS for n in r.notes} == set(NOTES)
    assert [r.name for r in ROWS if r.model is None] == ["MobileViTv3-0.5", "SkipblockNet-L", "VTP, DeiT-B"]


def test_footnotes_agree_with_the_figures():
    for level in ("L1", "L3", "L7"):  # c: doubled MACs; rounded where printed
        row = BY_NAME[f"EfficientFormer-{level}"]
        assert row.printed[1] == pytest.approx(2 * row.true[1], abs=0.08)
    assert round(BY_NAME["DeiT-Base/16"].true[1] - BY_NAME["EfficientFormer-L7"].true[1], 1) == 7.4
    assert "7.4 G below" in NOTES["c"]
    subtractive = {}
    for base in (0.7, 0.6, 0.5, 0.4):  # e: the geometric schedule gives what is printed, the subtractive one does not on all rows
        row = BY_NAME[f"DyViT-Sub/{base}"]
        assert row.printed[1] == round(row.true[1], 1)
        with torch.device("meta"):
            model = timm.create_model(DEIT).eval()
            pruned = vitprune.prune(model, tokens=vitprune.TokenPruning(base, schedule="subtractive", min_keep=0)).eval()
        subtractive[base] = count(pruned).macs / 1e9
        assert f"{subtractive[base]:.2f}" in NOTES["e"]
    assert [round(g, 1) for g in subtractive.values()] != [BY_NAME[f"DyViT-Sub/{b}"].printed[1] for b in subtractive]
    assert vitprune.TokenPruning(0.4).counts(196, 1)[-1] == 12
    with torch.device("meta"):
        c = count(table1.make(BY_NAME["DynamicViT-B/0.7"]))
        at_384 = count(timm.create_model("vit_base_patch16_384").eval())
    without = c.macs - sum(c.by_module["score_predictor"].values())
    assert f"{c.macs / 1e9:.3f}" in NOTES["d"]
    assert f"{without / 1e9:.3f}" in NOTES["d"]
    assert f"{at_384.macs / 1e9:.2f}" in NOTES["b"]
    assert f"{at_384.params / 1e6:.2f}" in NOTES["b"]


SMALL = (Row("dense", (1.0, 2.0, 160, 50.0), (0.1, 0.2, 160, 60.0), "a", "test_vit", (), "dense"),
         Row("network", None, (0.1, 0.2, 160, None), "", "test_efficientnet", (), "network"),
         Row("paper only", (None, 0.5, None, 70.0), (None,) * 4, "g"))


def test_rows(capsys):
    result = table1.table1(quick=True, rows=SMALL, base=0)
    dense, network, literature = result["rows"]
    assert literature["measured"] is None
    speed = network["measured"]["batch"]["1"]
    assert network["measured"]["macs"] == count(timm.create_model("test_efficientnet").eval()).macs
    assert speed["flops_ratio"] == dense["measured"]["macs"] / network["measured"]["macs"]
    assert speed["realised_gain"] == pytest.approx(speed["base_ms"] / speed["ms"] / speed["flops_ratio"])
    assert speed["images_per_s"] == pytest.approx(1e3 / speed["ms"])
    assert 0.3 < dense["measured"]["batch"]["1"]["speedup"] < 3  # the base row against itself
    json.dumps(result)
    table1.show(result)
    text = capsys.readouterr().out
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.count("|") > 5}
    assert "literature" in lines["paper only"]
    assert "not measured" in lines["dense"]
    assert "50.00" in lines["dense"]
    assert "60.00" in lines["dense"]
    assert all(f"[{key}]" in text for key in NOTES)


def test_accuracy_comes_from_data_and_checkpoints(tmp_path):
    from PIL import Image
    from timm.data import ImageNetInfo

    torch.manual_seed(0)
    data, weights = tmp_path / "data", tmp_path / "weights"
    weights.mkdir()
    synset = ImageNetInfo().label_names()[3]
    (data / synset).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (40, 40), (i * 80, 10, 200)).save(data / synset / f"{i}.png")
    model = timm.create_model("test_vit")
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = (torch.arange(1000) == 3).float()  # always class 3, the only one there is
    torch.save({"model": model.state_dict()}, weights / "dense.pth")
    result = table1.table1(quick=True, rows=SMALL, base=0, data=str(data), checkpoints=str(weights))
    assert result["rows"][0]["measured"]["top1"]["top1"] == 100
    assert result["rows"][0]["measured"]["top1"]["count"] == 3
    assert result["rows"][1]["measured"]["top1"] is None


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="data and checkpoints must be given together"):
        table1.table1(data=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="checkpoints must be a folder, got '/nosuch'"):
        table1.table1(data=str(tmp_path), checkpoints="/nosuch")
    with pytest.raises(FileNotFoundError, match="must hold NAME.pth"):
        table1.table1(data=str(tmp_path), checkpoints=str(tmp_path))
