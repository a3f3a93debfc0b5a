import json

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import vitprune
from vitprune import show
from vitprune.cli import main


@pytest.fixture
def model():
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5)
    dense.pretrained_cfg = dense.default_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return vitprune.prune(dense, vitprune.TokenPruning([8, 4], at=(1, 2), score="cls_attention"),
                          vitprune.BlockPruning(heads=(0.25, 0.5, 1.0), hidden=0.5, granularity=32)).eval()


def test_maps_are_the_live_units(model):
    heads, hidden = show.heads(model), show.hidden_blocks(model)
    for i, block in enumerate(model.blocks):
        live = range(4) if block.attn.live is None else block.attn.live.tolist()
        assert heads[i].nonzero().flatten().tolist() == list(live)
        assert hidden[i].nonzero().flatten().tolist() == block.mlp.live.tolist()
    assert show.heads(vitprune.compact(model)).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_command_writes_one_page(model, tmp_path, capsys):
    vitprune.save(model, tmp_path / "m")
    for i in range(2):
        Image.new("RGB", (40, 50), (90 * i, 50, 0)).save(tmp_path / f"{i}.png")
    records = [{"epoch": e, "step": 10 * e, "loss": 3.0 - e, "count": 5} for e in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert show.curves(tmp_path / "metrics.jsonl") == {"loss": ([1, 2, 3], [3.0, 2.0, 1.0])}
    out = tmp_path / "show.html"
    assert not main(["show", str(tmp_path / "m"), str(tmp_path / "0.png"), str(tmp_path / "1.png"), "--metrics",
                     str(tmp_path / "metrics.jsonl"), "--output", str(out)])
    text = out.read_text()
    assert text.count("<svg") == 3 and text.count("<img") == 1 and "http://" not in text.replace("http://www.w3.org", "")


def test_errors_name_what_is_wrong(model, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="bad.png must be a picture that can be read"):
        show.show(model, [tmp_path / "bad.png"], tmp_path / "x.html")
    (tmp_path / "m.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 of .* must be a record"):
        show.show(model, [], tmp_path / "x.html", tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="pictures must be none"):
        show.show(vitprune.prune(VisionTransformer(depth=1, embed_dim=32, num_heads=2), blocks=vitprune.BlockPruning()), ["a"], "x.html")
