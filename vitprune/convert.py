"""Weights from elsewhere: DynamicViT, facebookresearch DeiT, timm and Hugging Face checkpoints, loaded weights-only."""
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import check_state
from .surgery import is_masked, prune
from .tokens import TokenPruning
from .vit import PrunedViT

State = dict[str, Tensor]


class Loaded(NamedTuple):
    """What `load_weights` found."""
    layout: str                 # "timm" (also DeiT and DynamicViT, which use its names) or "huggingface"
    ignored: tuple[str, ...]    # keys that have no place in a vision transformer of timm's kind, such as HF's pooler


def load_weights(model: nn.Module, source: str | os.PathLike | Mapping[str, Tensor], key: str | None = None) -> Loaded:
    """Load foreign weights into a timm vision transformer or a pruned one, in place: all of them or none.

    source: a file (.safetensors, or a torch file read weights-only: nothing in it is executed) or a state dict, with the
        names of timm, facebookresearch DeiT (I, II, III), DynamicViT or Hugging Face's ViT and DeiT classes.
    key: the entry of a training checkpoint that holds the weights, such as "model_ema"; default: the first of "model",
        "state_dict", "module".
    The values are cast to the model's dtype. Its own settings stay: Hugging Face's LayerNorm eps is 1e-12, timm's 1e-6.
    Raises ValueError for a damaged file, one that asks for code, and one that does not fit, listing what differs; for a masked model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_weights: model must be a torch module, got {type(model).__name__}")
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise TypeError(f"load_weights: source must be a file or a state dict, got {type(source).__name__}")
    if is_masked(model):
        raise ValueError("load_weights: model must have all its heads and hidden units, those that are masked were chosen by the weights "
                         "it has: load first and prune then (a state dict of a masked model: model.load_state_dict)")
    where = f"load_weights: {source if isinstance(source, (str, os.PathLike)) else 'source'}"
    return _load(model, _state(read_checkpoint(source) if isinstance(source, (str, os.PathLike)) else source, key, where), where)


def load_dynamicvit(path: str | os.PathLike, model: str | nn.Module, keep: float = 0.7, *, key: str | None = None,
                    **tokens) -> PrunedViT:
    """The pruned model of an official DynamicViT checkpoint, in evaluation mode.

    model: timm's name of the backbone (classes are counted in the checkpoint) or the backbone itself, which is untouched.
    keep and tokens: TokenPruning's arguments; the checkpoint does not hold them. key: as for `load_weights`.
    Raises ValueError as `load_weights`, and where the checkpoint has another number of predictors than stages.
    """
    where = f"load_dynamicvit: {path}"
    state = _state(read_checkpoint(path), key, where)
    pruning = TokenPruning(keep, **tokens)
    found = len({k.split(".")[1] for k in state if k.startswith("score_predictor.")})
    if found != len(pruning.at):
        raise ValueError(f"{where} must hold one predictor for each of the {len(pruning.at)} stages of at={pruning.at}, got {found}")
    if isinstance(model, str):
        if not timm.is_model(model):
            raise ValueError(f"load_dynamicvit: model must be the name of a timm vision transformer, got {model!r}")
        model = timm.create_model(model, num_classes=len(state["head.weight"]) if "head.weight" in state else 0)
    pruned = prune(model, pruning)
    _load(pruned, state, where)
    return pruned.eval()


def start_from(model: nn.Module, path: str | os.PathLike, tokens: TokenPruning | None) -> tuple[nn.Module, nn.Module]:
    """(model to start from, its dense form) of a checkpoint that has token predictors or none: with them, the first is pruned
    as `tokens` says.

    Raises ValueError where the checkpoint has predictors and tokens is None, and as `load_weights` does.
    """
    state = read_checkpoint(path)
    nested = next((state[k] for k in ("model", "state_dict", "module") if isinstance(state.get(k), dict)), state)
    if not any("score_predictor." in name for name in nested):
        load_weights(model, path)
        return model, model
    if tokens is None:
        raise ValueError(f"tokens must be given, scored by predictors: {path} has them, but does not say how many patches stay")
    load_weights(model, {k: v for k, v in nested.items() if "score_predictor." not in k})
    pruned = prune(model, tokens=tokens)
    load_weights(pruned, path)
    return pruned, model


def _load(model: nn.Module, state: State, where: str) -> Loaded:
    own = model.state_dict()
    layout, ignored = "timm", ()
    if any("embeddings.patch_embeddings." in k for k in state):
        layout = "huggingface"
        state, ignored = _from_huggingface(state, "dist_token" if "dist_token" in own else "reg_token", where)
    state = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v for k, v in state.items()}  # DeiT III
    theirs, mine = state.get("pos_embed"), own.get("pos_embed")
    if theirs is not None and mine is not None and theirs.shape[1:2] != mine.shape[1:2]:
        raise ValueError(f"{where} must have the model's {mine.shape[1]} positions (image size {model.patch_embed.img_size}, "
                         f"patch size {model.patch_embed.patch_size}), got {theirs.shape[1]}: create the model for the "
                         "checkpoint's image size and class, nothing was loaded")
    check_state(model, state, where)
    model.load_state_dict(state, strict=True)
    return Loaded(layout, ignored)


# --- reading -------------------------------------------------------------------------------------------------------

class _Inert:
    """Stands in for what training scripts pickle beside the weights: takes anything, does nothing, keeps nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __setstate__(self, state) -> None:
        pass


_TOLERATED = (
    "argparse.Namespace", "types.SimpleNamespace", "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"pathlib.{local}{kind}Path" for local in ("", "_local.") for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")),
)


def read_checkpoint(path: str | os.PathLike) -> dict:
    """A torch or safetensors file as a dictionary. Of a pickle, tensors and plain values only; nothing is executed.

    Raises FileNotFoundError, and ValueError naming the file for one that is damaged or asks for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_checkpoint: path must be a file, got {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in _TOLERATED]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise ValueError(f"read_checkpoint: {path} is damaged or not a checkpoint of plain weights, nothing was executed "
                             f"({_first_line(error)})") from None
        raise ValueError(f"read_checkpoint: {path} must hold weights and plain values only, it asks for {asked[1]}: refused, "
                         "nothing was executed") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"read_checkpoint: {path} is truncated or not a checkpoint ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"read_checkpoint: {path} must hold a dictionary, got {type(content).__name__}")
    return content


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _state(content: Mapping, key: str | None, where: str) -> State:
    """The state dict in a checkpoint, without the prefixes that DDP, torch.compile and Lightning leave."""
    if key is None:
        key = next((k for k in ("model", "state_dict", "module") if isinstance(content.get(k), Mapping)), None)
    elif not isinstance(content.get(key), Mapping):
        raise ValueError(f"{where}: key must be one of its entries that hold weights, {_entries(content)}, got {key!r}")
    state = content if key is None else content[key]
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{where} must hold a state dict (names and tensors), got entries {_entries(state)}")
    while prefix := next((p for p in ("module.", "_orig_mod.", "model.") if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return dict(state)


def _entries(content: Mapping) -> str:
    names = [str(k) for k in content]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


# --- Hugging Face ----------------------------------------------------------------------------------------------------

_HF = tuple((re.compile(pattern.replace("LAYER", r"(?:encoder\.layer|layers)\.(\d+)") + r"(weight|bias)?"), name) for pattern, name in (
    (r"embeddings\.cls_token", "cls_token"),  # of two forms, the first is that of files, the second that of transformers 5
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", r"patch_embed.proj.\1"),
    (r"LAYER\.attention\.(?:attention\.query|q_proj)\.", r"blocks.\1.attn.qkv.\2/0"),
    (r"LAYER\.attention\.(?:attention\.key|k_proj)\.", r"blocks.\1.attn.qkv.\2/1"),
    (r"LAYER\.attention\.(?:attention\.value|v_proj)\.", r"blocks.\1.attn.qkv.\2/2"),
    (r"LAYER\.attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj.\2"),
    (r"LAYER\.layernorm_before\.", r"blocks.\1.norm1.\2"),
    (r"LAYER\.layernorm_after\.", r"blocks.\1.norm2.\2"),
    (r"LAYER\.(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1.\2"),
    (r"LAYER\.(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.", r"norm.\1"),
    (r"(?:cls_)?classifier\.", r"head.\1"),
    (r"distillation_classifier\.", r"head_dist.\1"),
))
_HF_IGNORED = re.compile(r"pooler\.dense\.(weight|bias)|embeddings\.mask_token")


def _from_huggingface(state: State, distillation: str, where: str) -> tuple[State, tuple[str, ...]]:
    """A ViT or DeiT state dict under timm's names, and the keys that were left out. Unknown keys stay as they are.

    distillation: the name of DeiT's second token; a model without a second head holds it as a register.
    """
    out, ignored = {}, []
    for name, value in state.items():
        bare = re.sub(r"^(vit|deit)\.", "", name)
        if _HF_IGNORED.fullmatch(bare):
            ignored.append(name)
        elif bare == "embeddings.distillation_token":
            out[distillation] = value
        else:
            match = next(((m, timm_name) for pattern, timm_name in _HF if (m := pattern.fullmatch(bare))), None)
            name = match[0].expand(match[1]) if match else name
            out[name] = value
    for name in [n for n in out if n.endswith("/0")]:
        parts = [out.get(name[:-1] + str(i)) for i in range(3)]
        if all(p is not None and p.shape == parts[0].shape for p in parts):
            for i in range(3):
                del out[name[:-1] + str(i)]
            out[name[:-2]] = torch.cat(parts)
    for name in out:
        if name[-2:] in ("/0", "/1", "/2"):
            raise ValueError(f"{where} must hold query, key and value of {name[:-2]}, of one shape; nothing was loaded")
    return out, tuple(sorted(ignored))
