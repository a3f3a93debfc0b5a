"""Save and load pruned models: one folder with `config.json` and `model.safetensors`."""
import dataclasses
import enum
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import timm.layers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers.activations import GELU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .dense import PatchProduct
from .layers import adopt
from .resume import sync
from .surgery import compact_block
from .tokens import TokenPruning
from .vit import PrunedDistilledViT, PrunedViT

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"

_CLASSES = {c.__name__: (c, base) for c, base in ((PrunedViT, VisionTransformer), (PrunedDistilledViT, VisionTransformerDistilled))}
_NORMS = {"torch.LayerNorm": nn.LayerNorm, "torch.RMSNorm": nn.RMSNorm, "timm.LayerNorm": timm.layers.LayerNorm,
          "timm.LayerNormFp32": timm.layers.LayerNormFp32, "timm.RmsNorm": timm.layers.RmsNorm,
          "timm.RmsNormFp32": timm.layers.RmsNormFp32}
_ACTS = {"torch.GELU": nn.GELU, "timm.GELU": GELU}
# what belongs to a run rather than to the model
_PASSING = {"training", "grad_checkpointing", "fused_attn", "weight_init_mode", "fix_init"}
_PREPROCESSING = ("architecture", "tag", "input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes",
                  "label_names", "first_conv", "classifier")


def save(model: PrunedViT, folder: str | os.PathLike) -> None:
    """Write a model that `prune` or `compact` made to `folder` (made where missing).

    `model.safetensors` holds the weights and, in its metadata, the configuration; it replaces an older one in a single
    rename after it has reached the disk, so that a crash or a full disk leaves the old model as it was. `config.json` is
    the same configuration for people and other programs. Not saved: training mode, `requires_grad`, hooks.
    Raises TypeError for another kind of model, ValueError naming what cannot be described, OSError where writing fails.
    """
    if type(model).__name__ not in _CLASSES or type(model) is not _CLASSES[type(model).__name__][0]:
        raise TypeError(f"save: model must come from vitprune.prune, got {type(model).__module__}.{type(model).__qualname__}")
    if model.learning is not None:
        raise ValueError("save: the model must have settled which blocks it keeps (vitprune.learned.settle), it is still learning them")
    config = _describe(model)
    for difference in _differences(model, _rebuild(config)):
        raise ValueError(f"save: the model must be what vitprune.prune makes from a timm model, but {difference}")
    text = json.dumps(config, indent=1) + "\n"
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt", "vitprune": text}))
    _replace(folder / CONFIG, lambda path: path.write_text(text))


def load(folder: str | os.PathLike, device: str | torch.device = "cpu") -> PrunedViT:
    """The model that `save` wrote, in evaluation mode; `model.pretrained_cfg` tells its preprocessing.

    Raises FileNotFoundError, and ValueError naming the file for one that is truncated, foreign or not consistent.
    """
    path, device = Path(folder) / WEIGHTS, torch.device(device)  # a device that does not exist is not the file's fault
    if not path.is_file():
        raise FileNotFoundError(f"load: folder must hold {WEIGHTS}, {path} is missing")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            text = (file.metadata() or {}).get("vitprune")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"load: {path} is truncated or not a safetensors file ({error})") from error
    if text is None:
        raise ValueError(f"load: {path} must be written by vitprune.save, it has no description of a pruned model "
                         "(load_weights reads foreign checkpoints)")
    try:
        config = json.loads(text)
        if config["format"] == FORMAT:
            _check_description(config, state)
            model = _rebuild(config)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"load: the description in {path} is damaged ({error!r})") from error
    if config["format"] != FORMAT:
        raise ValueError(f"load: {path} must be of format {FORMAT}, got {config['format']} (written by another version)")
    check_state(model, state, f"load: {path}")
    model.load_state_dict(state, strict=True, assign=True)
    for block, sizes in zip(model.blocks, config["blocks"]):  # after the weights: ids live on their device
        block.attn.set_live(sizes["live_heads"])
        if sizes.get("dims") is not None:
            block.attn.set_dims(torch.tensor(sizes["dims"], device=device))
        block.mlp.set_live(sizes["live_hidden"], sizes["width"])
    model.mark_untrained(not config["trained"])
    if config["preprocessing"]:
        model.pretrained_cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in config["preprocessing"].items()}
        model.default_cfg = model.pretrained_cfg
    return model.eval()


def check_state(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Raise ValueError listing every difference between the names, shapes and kinds of `state` and those of `model`."""
    own = model.state_dict()
    wrong = [f"{k} {list(v.shape)} {v.dtype} instead of {list(own[k].shape)} {own[k].dtype}" for k, v in state.items()
             if k in own and (v.shape != own[k].shape or v.is_floating_point() != own[k].is_floating_point())]
    lists = {"missing": sorted(own.keys() - state.keys()), "unexpected": sorted(state.keys() - own.keys()), "mismatched": wrong}
    if any(lists.values()):
        raise ValueError(f"{where} must match the model, nothing was loaded; " +
                         "; ".join(f"{name} ({len(keys)}): {', '.join(keys)}" for name, keys in lists.items() if keys))


# --- a model as a description, and back -----------------------------------------------------------------------------

def _describe(model: PrunedViT) -> dict:
    """What `_rebuild` needs. timm models do not keep their constructor's arguments, so they are read off the modules."""
    embed, blocks, tokens = model.patch_embed, list(model.blocks), model.tokens
    if type(embed) is not PatchProduct:
        raise ValueError(f"save: patch_embed must be timm's PatchEmbed, got {type(embed).__qualname__}")
    first, last, C = blocks[0], blocks[-1], model.embed_dim
    widest = max(1, *(b.mlp.fc1.out_features for b in blocks))
    if getattr(model.attn_pool, "mlp", None) is not None:
        widest = max(widest, model.attn_pool.mlp.fc1.out_features)
    final = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    arguments = {
        "img_size": embed.img_size, "patch_size": embed.patch_size, "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes, "global_pool": model.global_pool, "embed_dim": C, "depth": len(blocks),
        "num_heads": round(C * first.attn.scale ** 2), "mlp_ratio": (widest + 0.5) / C,  # the half: int(C * ratio) must round down
        "qkv_bias": first.attn.qkv.bias is not None, "qk_norm": not isinstance(first.attn.q_norm, nn.Identity),
        "proj_bias": first.attn.proj.bias is not None, "init_values": getattr(first.ls1, "init_values", None),
        "class_token": model.has_class_token, "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class, "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity), "final_norm": not isinstance(final, nn.Identity),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity), "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size, "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p, "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0), "proj_drop_rate": first.mlp.drop1.p,
        "attn_drop_rate": first.attn.attn_drop.p, "drop_path_rate": getattr(last.drop_path1, "drop_prob", 0.0),
        "norm_layer": _norm("blocks.0.norm1", first.norm1),
        "embed_norm_layer": None if isinstance(embed.norm, nn.Identity) else _norm("patch_embed.norm", embed.norm),
        "act_layer": next((name for name, cls in _ACTS.items() if type(first.mlp.act) is cls), None),
    }
    return {
        "format": FORMAT, "class": type(model).__name__, "arguments": arguments,
        "distilled_training": getattr(model, "distilled_training", False),
        "blocks": [{"heads": b.attn.num_heads, "live_heads": None if b.attn.live is None else b.attn.live.tolist(),
                    "hidden": b.mlp.fc1.out_features, "live_hidden": None if b.mlp.live is None else b.mlp.live.tolist(),
                    "width": b.mlp.width, "head_dim": b.attn.head_dim,
                    "dims": None if b.attn.dims is None else b.attn.dims.tolist()} for b in blocks],
        "tokens": None if tokens is None else dataclasses.asdict(tokens), "trained": not model.is_untrained(),
        "preprocessing": _preprocessing(model),
    }


def _norm(name: str, module: nn.Module) -> dict:
    for key, cls in _NORMS.items():
        if type(module) is cls:
            return {"type": key, "eps": module.eps}
    raise ValueError(f"save: {name} must be one of {', '.join(_NORMS)}, got {type(module).__module__}.{type(module).__qualname__}")


def _preprocessing(model: PrunedViT) -> dict:
    known = getattr(model, "pretrained_cfg", None) or {}
    known = known if isinstance(known, dict) else known.to_dict()
    kept = {k: known[k] for k in _PREPROCESSING if known.get(k) is not None}
    embed = model.patch_embed
    return kept | {"input_size": (embed.proj.in_channels, *embed.img_size), "num_classes": model.num_classes} if kept else {}


def _check_description(config: dict, state: dict[str, Tensor]) -> None:
    """Raise ValueError where a description cannot be that of these tensors, before anything is made as large as it says."""
    kinds = {"class": str, "arguments": dict, "distilled_training": bool, "blocks": list, "trained": bool, "preprocessing": dict}
    switches = ("class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm", "dynamic_img_size", "qkv_bias", "proj_bias",
                "qk_norm", "pool_include_prefix")
    wrong = [name for name, kind in kinds.items() if not isinstance(config[name], kind)]
    wrong += [name for name in switches if not isinstance(config["arguments"].get(name), (bool, type(None)))]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    wrong += ["depth"] if not depth == len(config["blocks"]) == config["arguments"]["depth"] else []
    for i, sizes in enumerate(config["blocks"] if not wrong else ()):
        units = {"hidden": state[f"blocks.{i}.mlp.fc1.weight"].shape[0], "heads": state[f"blocks.{i}.attn.qkv.weight"].shape[0]}
        sized = all(isinstance(sizes[name], int) for name in ("heads", "head_dim", "hidden")) and sizes["head_dim"] > 0
        if not sized or sizes["hidden"] != units["hidden"] or 3 * sizes["heads"] * sizes["head_dim"] != units["heads"]:
            wrong.append(f"blocks[{i}]")
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot be as described")


def _rebuild(config: dict) -> PrunedViT:
    """The described model on the meta device, its live units not yet chosen."""
    cls, base = _CLASSES[config["class"]]
    arguments = dict(config["arguments"])
    for name in ("norm_layer", "embed_norm_layer"):
        arguments[name] = arguments[name] and _maker(**arguments[name])
    arguments["act_layer"] = _ACTS.get(arguments["act_layer"])
    for name in ("img_size", "patch_size"):
        arguments[name] = tuple(arguments[name])
    model = adopt(cls, base(**arguments, weight_init="skip", device="meta"))
    if config["distilled_training"]:
        model.distilled_training = True
    for block, sizes in zip(model.blocks, config["blocks"], strict=True):
        block.attn.set_live(range(sizes["heads"]))
        if sizes.get("head_dim", block.attn.head_dim) != block.attn.head_dim:
            block.attn.set_dims(torch.arange(sizes["head_dim"], device="meta").expand(2, block.attn.num_heads, -1))
        block.mlp.set_live(range(sizes["hidden"]), 1)
        compact_block(block)
        block.mlp.set_live(None, sizes["width"])
    if config["tokens"] is not None:
        with torch.device("meta"):
            model._set_tokens(TokenPruning(**config["tokens"]))
    return model


def _maker(type: str, eps: float) -> Callable[..., nn.Module]:
    return lambda dim, **kwargs: _NORMS[type](dim, eps=eps, **kwargs)


def _differences(model: nn.Module, rebuilt: nn.Module) -> Iterator[str]:
    """Sentences on what distinguishes two models: modules, their plain attributes, names and shapes of the state."""
    theirs = dict(rebuilt.named_modules())
    for name, module in model.named_modules():
        where = f"{name}." if name else ""
        if name not in theirs or type(module) is not type(theirs[name]):
            yield f"{name} is a {type(module).__module__}.{type(module).__qualname__}, which a description cannot hold"
            return
        for key, value in theirs.pop(name).__dict__.items():
            own = module.__dict__.get(key, value)
            if key.startswith("_") or key in _PASSING or not isinstance(value, (int, float, str, tuple, enum.Enum, type(None))):
                continue
            if own != value and not (isinstance(own, float) and isinstance(value, float) and math.isclose(own, value)):
                yield f"{where}{key} is {own!r}, which a description cannot hold (it gives {value!r})"
    for name in theirs:
        yield f"it lacks the module {name}"
    own, other = ({k: list(v.shape) for k, v in m.state_dict().items()} for m in (model, rebuilt))
    for key in sorted(own.keys() | other.keys()):
        if own.get(key) != other.get(key):
            yield f"{key} has shape {own.get(key)}, which a description cannot hold (it gives {other.get(key)})"


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a new file beside `path`, bring it to the disk, then rename it over the old one."""
    new = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write(new)
        for item in (new, path.parent):  # the folder too: the name of the new file is kept there
            sync(item)
        os.replace(new, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"save: {path} could not be written, an older file is as it was: {error}") from error
    finally:
        new.unlink(missing_ok=True)
