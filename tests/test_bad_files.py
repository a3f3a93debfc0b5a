"""Every kind of bad file at the public surface and the one error that answers it; none of them executes anything."""
import json
import os

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_bad_input import Z, doubled, fails_with, sequence, vit
from torch import nn

from vitprune import TokenPruning, prune
from vitprune.checkpoint import load, save
from vitprune.convert import load_dynamicvit, load_weights


def odd_norm():
    model = sequence()
    model.blocks[2].norm1.eps = 0.1
    return model


def odd_block():
    model = sequence()
    model.blocks[1].mlp.act = nn.ReLU()
    return model


def write(name, content):
    def make(folder):
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            (save_file if name.endswith("safetensors") else torch.save)(content, path)
        return path
    return make


def cut(name):
    def make(folder):
        path = write(name, vit().state_dict())(folder)
        path.write_bytes(path.read_bytes()[:-1000])
        return path
    return make


def damage(edit):
    def make(folder):
        save(sequence(), folder)
        edit(folder / "model.safetensors")
        return folder
    return make


def described(text):
    return damage(lambda path: save_file({}, path, metadata={"vitprune": text}))


def redescribed(change):
    """A whole model whose description `change` has altered."""
    def edit(path):
        with safe_open(path, "pt") as file:
            description, state = json.loads(file.metadata()["vitprune"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(description)
        save_file(state, path, metadata={"vitprune": json.dumps(description)})
    return damage(edit)


FILES = {  # message -> (what to write into a folder, what to do with it)
    "save: model must come from vitprune.prune, got timm.models.vision_transformer.VisionTransformer":
        (lambda d: d, lambda d: save(vit(), d)),
    "save: the model must be what vitprune.prune makes from a timm model, but blocks.2.norm1.eps is 0.1":
        (lambda d: d, lambda d: save(odd_norm(), d)),
    "save: the model must be what vitprune.prune makes from a timm model, but blocks.1.mlp.act is a torch.nn.modules.activation.ReLU":
        (lambda d: d, lambda d: save(odd_block(), d)),
    "save: patch_embed must be timm's PatchEmbed, got HybridEmbed":
        (lambda d: d, lambda d: save(prune(timm.create_model("vit_tiny_r_s16_p8_224"), TokenPruning(0.5)), d)),
    "load: folder must hold model.safetensors, ": (lambda d: d, load),
    "model.safetensors is truncated or not a safetensors file": (damage(lambda p: p.write_bytes(p.read_bytes()[:-1000])), load),
    "model.safetensors must be written by vitprune.save": (write("model.safetensors", vit().state_dict()), lambda p: load(p.parent)),
    "must be of format 1, got 99 (written by another version)": (described('{"format": 99}'), load),
    "is damaged (KeyError('class'))": (described('{"format": 1}'), load),
    "is damaged (ValueError('blocks[0] cannot be as described'))":
        (redescribed(lambda d: d["blocks"][0].update(heads=10 ** 9)), load),
    "is damaged (ValueError('blocks[1] cannot be as described'))":
        (redescribed(lambda d: d["blocks"][1].update(hidden=10 ** 9)), load),
    "is damaged (ValueError('depth cannot be as described'))":
        (redescribed(lambda d: d["arguments"].update(depth=10 ** 9)), load),
    "is damaged (ValueError('trained, preprocessing, qkv_bias cannot be as described'))":
        (redescribed(lambda d: (d.update(trained="evil", preprocessing="evil"), d["arguments"].update(qkv_bias={}))), load),
    "is damaged (JSONDecodeError": (described('{"format'), load),
    "read_checkpoint: path must be a file, got": (lambda d: d / "none.pth", lambda p: load_weights(vit(), p)),
    "w.pth is truncated or not a checkpoint": (cut("w.pth"), lambda p: load_weights(vit(), p)),
    "w.safetensors is truncated or not a checkpoint": (cut("w.safetensors"), lambda p: load_weights(vit(), p)),
    "e.pth is truncated or not a checkpoint": (write("e.pth", b""), lambda p: load_weights(vit(), p)),
    "t.pth is damaged or not a checkpoint": (write("t.pth", b"<html>404</html>"), lambda p: load_weights(vit(), p)),
    "l.pth must hold a dictionary, got list": (write("l.pth", [1]), lambda p: load_weights(vit(), p)),
    "n.pth must hold a state dict (names and tensors), got entries epoch": (write("n.pth", {"epoch": 1}), lambda p: load_weights(vit(), p)),
    "key must be one of its entries that hold weights, model, got 'ema'":
        (write("k.pth", {"model": vit().state_dict()}), lambda p: load_weights(vit(), p, key="ema")),
    "must match the model, nothing was loaded; missing (2): head.bias, head.weight; unexpected (1): fc.weight":
        (lambda d: {k.replace("head.weight", "fc.weight"): v for k, v in vit().state_dict().items() if k != "head.bias"},
         lambda s: load_weights(vit(), s)),
    "mismatched (1): head.weight [10, 64] torch.float32 instead of [5, 64] torch.float32":
        (lambda d: doubled(vit(), "head.weight"), lambda s: load_weights(vit(), s)),
    "must have the model's 17 positions (image size (32, 32), patch size (8, 8)), got 65: create the model for":
        (lambda d: vit(img_size=64).state_dict(), lambda s: load_weights(vit(), s)),
    "must match the model, nothing was loaded; missing (10): score_predictor.0":
        (lambda d: vit().state_dict(), lambda s: load_weights(sequence(), s)),
    "must hold query, key and value of blocks.0.attn.qkv.weight, of one shape":
        (lambda d: {"vit.embeddings.patch_embeddings.projection.bias": Z(64), "vit.layers.0.attention.q_proj.weight": Z(64, 64)},
         lambda s: load_weights(vit(), s)),
    "must hold one predictor for each of the 3 stages of at=(3, 6, 9), got 0":
        (write("d.pth", {"model": vit().state_dict()}), lambda p: load_dynamicvit(p, "deit_tiny_patch16_224")),
    "load_dynamicvit: model must be the name of a timm vision transformer, got 'dyvit'":
        (write("y.pth", sequence().state_dict()), lambda p: load_dynamicvit(p, "dyvit", at=(1,))),
}


@pytest.mark.parametrize("message", FILES)
def test_files(tmp_path, message):
    make, action = FILES[message]
    fails_with(message, action, make(tmp_path))


def test_a_refused_checkpoint_changes_nothing():
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fails_with("head.weight", load_weights, model, doubled(vit(), "head.weight"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Attack:
    """Pickles as a call of whatever it was made of."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, named", [(os.system, "(posix|nt).system"), (os.mkdir, "(posix|nt).mkdir"), (eval, "eval"),
                                             (exec, "exec"), (getattr, "getattr"), (np.save, "numpy.save")])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_execute_code_is_refused(tmp_path, function, named, legacy):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    argument = {os.system: f"touch {canary}", os.mkdir: str(canary)}.get(function, f"open({str(canary)!r}, 'w').close()")
    content = {"model": vit().state_dict(), "args": Attack(function, argument)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for read in (lambda: load_weights(vit(), path), lambda: load_dynamicvit(path, "deit_tiny_patch16_224")):
        with pytest.raises(ValueError, match=rf"evil.pth must hold weights and plain values only, it asks for ([\w.]*\.)?{named}: refused"):
            read()
        assert not canary.exists()
    if function in (os.system, eval, exec, os.mkdir):  # the canary works: an unguarded reader does execute it
        torch.load(path, weights_only=False)
        assert canary.exists()


