"""Saving and loading: exact round trips, crash safety, and weights from other projects."""
import argparse
import copy
import json
import pathlib
import pickle
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprune import BlockPruning, TokenPruning, compact, prune
from vitprune.checkpoint import load, save
from vitprune.convert import load_dynamicvit, load_weights

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))
import weights  # noqa: E402

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 5}
VARIANTS = {
    "plain": {}, "layer_scale_qk_norm": {"init_values": 1e-4, "qk_norm": True}, "registers": {"reg_tokens": 3, "no_embed_class": True},
    "no_class_token": {"class_token": False, "global_pool": "avg"}, "prefix_pool": {"global_pool": "avg", "pool_include_prefix": True},
    "pre_norm": {"pre_norm": True}, "sizes": {"img_size": (32, 16), "patch_size": (8, 4), "in_chans": 1, "mlp_ratio": 3.0},
    "no_bias": {"qkv_bias": False, "proj_bias": False}, "no_position": {"pos_embed": "none"},
    "any_size": {"dynamic_img_size": True, "dynamic_img_pad": True}, "norms": {"norm_layer": "rmsnorm", "embed_norm_layer": "layernorm"},
    "eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-3)}, "fc_norm": {"fc_norm": True}, "no_norm": {"final_norm": False},
    "no_head": {"num_classes": 0},
    "drop": dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), 0.1),
}
TOKENS = [TokenPruning(0.7, at=(1, 2)), TokenPruning((12, 0.5), at=(1, 3), score="cls_attention", multiple_of=4),
          TokenPruning(0.9, at=(0, 1), schedule="subtractive", score="random"), TokenPruning(0.7, at=(2,), threshold=0.4, min_keep=3), None]
UNEVEN = BlockPruning(heads=(0, 0.25, 0.5, 1), hidden=(0.5, 0, 1, 0.25), granularity=32)


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model.eval()


def outputs(model):
    """Evaluation and training (dropout and Gumbel noise included) on the same inputs and the same noise."""
    embed, out = model.patch_embed, []
    x = torch.randn(2, embed.proj.in_channels, *embed.img_size, generator=torch.Generator().manual_seed(1)).to(embed.proj.weight.dtype)
    mode = model.training
    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", message="the token predictors are untrained")
        for training in (False, True):
            torch.manual_seed(2)
            out.append(model.train(training)(x))
    model.train(mode)
    return torch.cat(out)


def check_round_trip(model, folder):
    before, state = outputs(model), torch.get_rng_state()
    save(model, folder)
    loaded = load(folder)
    assert torch.equal(state, torch.get_rng_state()), "loading must not draw random numbers"
    assert type(loaded) is type(model)
    assert loaded.tokens == model.tokens
    assert not loaded.training
    assert torch.isfinite(before).all()
    assert torch.equal(outputs(loaded), before)
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    for a, b in zip(loaded.blocks, model.blocks):
        assert (a.attn.live_heads, a.mlp.live_hidden, a.mlp.width) == (b.attn.live_heads, b.mlp.live_hidden, b.mlp.width)
    assert sorted(p.name for p in Path(folder).iterdir()) == ["config.json", "model.safetensors"]
    return loaded


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("small", [False, True], ids=["masked", "compacted"])
def test_round_trip_of_every_kind(tmp_path, name, small):
    model = prune(randomised(VisionTransformer(**{**SMALL, **VARIANTS[name]})), TOKENS[0], UNEVEN)
    model = randomised(compact(model) if small else model)
    check_round_trip(model, tmp_path)


def test_round_trip_of_what_a_loaded_model_becomes(tmp_path):
    loaded = check_round_trip(prune(randomised(VisionTransformer(**SMALL)), TOKENS[0], UNEVEN), tmp_path)
    again = prune(compact(loaded), blocks=BlockPruning(0.5, 0.5, granularity=1))
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), compact(loaded), again, compact(again)):
        check_round_trip(other, tmp_path)


@pytest.mark.parametrize("tokens", TOKENS, ids=["geometric", "list", "subtractive", "adaptive", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_of_token_options(tmp_path, tokens, dtype):
    blocks = None if tokens else BlockPruning(0.5, 0.5)
    check_round_trip(prune(randomised(VisionTransformer(**SMALL)), tokens, blocks).to(dtype), tmp_path)


def test_round_trip_of_distilled_pooled_and_reset_models(tmp_path):
    distilled = prune(randomised(VisionTransformerDistilled(**SMALL)), TOKENS[0], UNEVEN)
    distilled.set_distilled_training(True)
    save(compact(distilled), tmp_path)
    assert load(tmp_path).distilled_training
    distilled.set_distilled_training(False)
    check_round_trip(compact(distilled), tmp_path)
    check_round_trip(prune(randomised(VisionTransformer(**SMALL, global_pool="map")), blocks=UNEVEN), tmp_path)
    model = prune(randomised(VisionTransformer(**SMALL)), TOKENS[0])
    model.reset_classifier(9, "avg")
    assert check_round_trip(model, tmp_path).head.out_features == 9
    model.set_input_size((64, 32))
    assert check_round_trip(model, tmp_path).patch_embed.grid_size == (8, 4)


def test_a_loaded_model_trains(tmp_path):
    save(compact(prune(randomised(VisionTransformer(**SMALL)), TOKENS[0], UNEVEN)), tmp_path)
    model = load(tmp_path).train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.requires_grad for p in model.parameters())
    assert model.blocks[1].attn.qkv.weight.grad.abs().sum() > 0


def test_preprocessing_is_kept(tmp_path):
    dense = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", img_size=64, num_classes=7)
    expected = timm.data.resolve_data_config(pretrained_cfg={**dense.pretrained_cfg, "input_size": (3, 64, 64)})
    save(prune(dense, TokenPruning(0.7)), tmp_path)
    assert timm.data.resolve_data_config(pretrained_cfg=load(tmp_path).pretrained_cfg) == expected
    assert expected["mean"] == (0.5, 0.5, 0.5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["preprocessing"]["architecture"] == "vit_tiny_patch16_224"
    assert config["preprocessing"]["num_classes"] == 7


def test_loaded_predictors_warn_only_if_never_trained(tmp_path):
    model, x = prune(VisionTransformer(**SMALL), TOKENS[0]).eval(), torch.randn(1, 3, 32, 32)
    with pytest.warns(UserWarning, match="untrained"):
        model(x)
    save(model, tmp_path)  # evaluated, yet never trained
    with pytest.warns(UserWarning, match="untrained"):
        load(tmp_path)(x)
    with torch.no_grad():
        model.score_predictor[0].out_conv[4].weight.mul_(1.01)
    save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)(x)


# --- crash safety ------------------------------------------------------------------------------------------------------

CRASH = """
    import os, resource, sys, torch
    from vitprune import checkpoint
    model = checkpoint.load(sys.argv[1])
    with torch.no_grad():
        model.head.bias.fill_(2.0)
    {fault}
    checkpoint.save(model, sys.argv[1])
"""
FAULTS = {  # fault -> (exit status, the bias that is found afterwards)
    "killed_before_the_rename": ("os.replace = lambda *a: os._exit(9)", 9, 1.0),
    "killed_while_writing": ("checkpoint.save_file = lambda s, path, **k: (path.write_bytes(b'x' * 99), os._exit(9))", 9, 1.0),
    "killed_between_the_files": ("r = os.replace; os.replace = lambda a, b: os._exit(9) if b.suffix == '.json' else r(a, b)", 9, 2.0),
    "disk_full": ("resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))", 1, 1.0),
}


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("name", FAULTS)
def test_a_crash_leaves_one_whole_model(tmp_path, name):
    fault, status, bias = FAULTS[name]
    model = prune(VisionTransformer(**SMALL), TOKENS[0])
    nn.init.constant_(model.head.bias, 1.0)
    save(model, tmp_path)
    code = textwrap.dedent(CRASH).format(fault=fault)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == status, run.stderr
    assert load(tmp_path).head.bias.tolist() == [bias] * 5
    if name == "disk_full":
        assert f"save: {tmp_path / 'model.safetensors'} could not be written, an older file is as it was" in run.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# --- weights from elsewhere ----------------------------------------------------------------------------------------------

def official(model):
    """An official training checkpoint: weights in the named entry, and everything else that its trainer pickles."""
    state = {k: torch.from_numpy(weights.parameter(k, tuple(v.shape))).float() for k, v in model.state_dict().items()}
    args = argparse.Namespace(base_rate=0.7, lr=np.float64(0.1), finetune=pathlib.Path("x.pth"), device=torch.device("cpu"))
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    return {"model": state, "optimizer": optimizer.state_dict(), "epoch": 29, "scaler": {"scale": 1.0}, "args": args,
            "best": np.float32(81.4), "best_ema": np.int64(3), "model_ema": {k: v + 1 for k, v in state.items()}}


def test_official_dynamicvit_checkpoint_gives_the_official_logits(tmp_path):
    path = tmp_path / "dynamicvit.pth"
    content = official(prune(timm.create_model("deit_tiny_patch16_224"), TokenPruning(0.7)))
    assert len(content["model"]) == 182
    torch.save(content, path)
    golden, x = np.load(DATA / "golden_ti.npz"), torch.from_numpy(weights.tensor("image", (2, 3, 224, 224))).float()
    for case, options in (("geo0.7", {"keep": 0.7}), ("sub0.4", {"keep": 0.4, "schedule": "subtractive", "min_keep": 0})):
        model = load_dynamicvit(path, "deit_tiny_patch16_224", **options)
        assert not model.is_untrained()
        with torch.no_grad():
            assert np.abs(model(x).double().numpy() - golden[f"{case}_logits"]).max() <= 1e-5
    ema = load_dynamicvit(path, timm.create_model("deit_tiny_patch16_224"), key="model_ema")
    assert torch.equal(ema.cls_token, content["model_ema"]["cls_token"])
    with pytest.raises(ValueError, match="one predictor for each of the 2 stages .* got 3"):
        load_dynamicvit(path, "deit_tiny_patch16_224", at=(3, 6))


@pytest.mark.parametrize("layout", ["deit", "deit3", "ddp", "safetensors", "dict"])
@pytest.mark.parametrize("pruned", [False, True])
def test_timm_layouts(tmp_path, layout, pruned):
    kinds = {"init_values": 1e-3} if layout == "deit3" else {}
    source, model = randomised(VisionTransformer(**SMALL, **kinds)), VisionTransformer(**SMALL, **kinds).eval()
    state = {k: v.half().float() for k, v in source.state_dict().items()}
    source.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    if pruned:
        model = prune(model, TokenPruning(1.0, at=(1,), score="random"))
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth")
    if layout == "safetensors":
        save_file({k: v.half() for k, v in state.items()}, path)
    elif layout == "deit3":
        torch.save({"model": {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}}, path)
    elif layout == "ddp":
        torch.save({"state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}, "arch": "vit"}, path)
    else:
        torch.save({"model": state, "args": argparse.Namespace()}, path)
    assert load_weights(model, state if layout == "dict" else path) == ("timm", ())
    with torch.no_grad():
        assert torch.equal(model.state_dict()["blocks.3.mlp.fc2.weight"], state["blocks.3.mlp.fc2.weight"])
        assert torch.allclose(model(x), source(x), atol=1e-5)


HF = {"ViTForImageClassification": (VisionTransformer, {}), "ViTModel": (VisionTransformer, {"num_classes": 0}),
      "DeiTForImageClassification": (VisionTransformer, {"reg_tokens": 1}),
      "DeiTForImageClassificationWithTeacher": (VisionTransformerDistilled, {})}


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("form", ["memory", "safetensors", "bin"])
def test_hugging_face(tmp_path, name, form):
    transformers = pytest.importorskip("transformers")
    cls, options = HF[name]
    config = (transformers.DeiTConfig if name.startswith("DeiT") else transformers.ViTConfig)(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8, num_labels=5)
    theirs = randomised(getattr(transformers, name)(config))
    ours = cls(**{**SMALL, **options}, norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps)).eval()
    source = theirs.state_dict()
    if form != "memory":
        theirs.save_pretrained(tmp_path)  # the names in files are not those in memory
        source = tmp_path / "model.safetensors"
        if form == "bin":
            from safetensors.torch import load_file
            torch.save(load_file(source), tmp_path / "pytorch_model.bin")
            source = tmp_path / "pytorch_model.bin"
    found = load_weights(ours, source)
    assert found.layout == "huggingface"
    assert found.ignored == (("pooler.dense.bias", "pooler.dense.weight") if name == "ViTModel" else ())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(x).last_hidden_state[:, 0] if name == "ViTModel" else theirs(x).logits
        assert expected.std() > 0.1
        assert (ours(x) - expected).abs().max() <= 1e-5
