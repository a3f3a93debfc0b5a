"""Arguments that several commands share, and the model that they describe."""
import warnings
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace


def add_pruning(parser: ArgumentParser, folder: bool = True) -> None:
    parser.add_argument("model", type=str, help="timm model name" + (" or a folder written by `vitprune prune`" if folder else ""))
    parser.add_argument("--tokens", type=int | float, nargs="+", help="base rate; or one entry a stage: ratios (0.7) or counts (137)")
    parser.add_argument("--at", type=int, nargs="+", help="blocks before which tokens leave (3 6 9)")
    parser.add_argument("--schedule", type=str, help="of a base rate: geometric (default) or subtractive")
    parser.add_argument("--score", type=str, help="predictor (default), cls_attention or random")
    parser.add_argument("--heads", type=int | float, nargs="+", help="fraction of heads kept; one, or one a layer")
    parser.add_argument("--hidden", type=int | float, nargs="+", help="fraction of hidden units kept; one, or one a layer")
    parser.add_argument("--method", type=str, help="how heads and hidden units are chosen: magnitude (default) or random")


def add_weights(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=str, help="weights of the timm model: .pth or .safetensors")
    parser.add_argument("--pretrained", action="store_true", help="timm's pretrained weights")


def add_json(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout and nothing else there")


def scalar(values: list | None):
    return values[0] if values is not None and len(values) == 1 else values


def tokens_of(options: Namespace):
    """A single ratio is a base rate; a single count stays a list of one stage."""
    values = options.tokens
    return values if values is not None and len(values) == 1 and isinstance(values[0], int) and values[0] > 1 else scalar(values)


def fill_in(options: Namespace) -> None:
    """Refuse options that would have no effect, then fill in the defaults."""
    base_rate = options.tokens is not None and not isinstance(tokens_of(options), list)
    for name, default, used, needs in (("at", [3, 6, 9], options.tokens is not None, "--tokens"),
                                       ("score", "predictor", options.tokens is not None, "--tokens"),
                                       ("schedule", "geometric", base_rate, "--tokens with one base rate"),
                                       ("method", "magnitude", (options.heads, options.hidden) != (None, None), "--heads or --hidden")):
        if options[name] is not None and not used:
            raise ValueError(f"--{name} needs {needs}: without, it has no effect")
        options[name] = default if options[name] is None else options[name]


def pruning_of(options: Namespace) -> dict:
    return {"tokens": tokens_of(options), "schedule": options.schedule, "heads": scalar(options.heads), "hidden": scalar(options.hidden)}


def device_of(options: Namespace, command: str) -> str:
    from .doctor import choose_device
    return choose_device(options.device, command)


def model_of(options: Namespace, compacted: bool = True):
    """The model that the arguments describe, in evaluation mode: a saved folder, or a timm model, pruned where asked."""
    import timm

    import vitprune

    fill_in(options)
    checkpoint, pretrained = getattr(options, "checkpoint", None), getattr(options, "pretrained", False)
    if Path(options.model).is_dir():
        if checkpoint or pretrained:
            raise ValueError(f"{options.model} is a saved model: --checkpoint and --pretrained are for timm models")
        model = vitprune.load(options.model)
    elif timm.is_model(options.model):
        if checkpoint and pretrained:
            raise ValueError("--checkpoint and --pretrained exclude each other")
        model = timm.create_model(options.model, pretrained=pretrained)
        if "pretrained" in options and not (checkpoint or pretrained):
            warnings.warn(f"the weights of {options.model} are random: --pretrained or --checkpoint gives others", stacklevel=2)
    else:
        raise ValueError(f"model must be a timm model name or a folder written by `vitprune prune`, got {options.model!r}")
    tokens = blocks = None
    if options.tokens is not None:
        tokens = vitprune.TokenPruning(tokens_of(options), at=tuple(options.at), schedule=options.schedule, score=options.score)
    if options.heads is not None or options.hidden is not None:
        blocks = vitprune.BlockPruning(1.0 if options.heads is None else scalar(options.heads),
                                       1.0 if options.hidden is None else scalar(options.hidden), method=options.method)
    if checkpoint:
        model, dense = vitprune.convert.start_from(model, checkpoint, tokens if options.score == "predictor" else None)
        tokens = tokens if model is dense else None  # with predictors in the checkpoint the tokens are pruned already
    if tokens or blocks:
        model = vitprune.prune(model, tokens=tokens, blocks=blocks)
    if blocks and compacted:
        model = vitprune.compact(model)
    return model.eval()
