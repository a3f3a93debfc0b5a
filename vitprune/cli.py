"""The command line: `vitprune train | demo | prune | eval | flops | bench | table1 | export | doctor | tune`."""
import json
import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from inspect import getdoc
from pathlib import Path
from typing import get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from .arguments import add_json, add_pruning, add_weights, device_of, fill_in, model_of, pruning_of, scalar

USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, ArgumentError)
_UNION = re.compile(r"Does not validate against any of the Union subtypes .*?Errors: - (.*?) - Expected a <class 'NoneType'>.*")


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Docstrings keep their lines."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's error is one line on stderr and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        name, options = _parse(argv)
        status = COMMANDS[name][2](options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell says of a process that SIGPIPE ended
    except USER_ERRORS as e:
        text = _UNION.sub(r"\1", " ".join(str(e).split()))
        print(f"vitprune: error: {text or type(e).__name__}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> tuple[str, Namespace]:
    parser = ArgumentParser(prog="vitprune", description="Pruned vision transformers.", exit_on_error=False, allow_abbrev=False,
                            formatter_class=_Help)
    commands = parser.add_subcommands(required=True, dest="command")
    asked = next((a for a in argv if not a.startswith("-")), None)
    for name, (summary, add, _) in COMMANDS.items():
        one = ArgumentParser(description=summary, exit_on_error=False, allow_abbrev=False)
        if name == asked:  # the other commands' parsers would import what they need
            add(one)
        commands.add_subcommand(name, one, help=summary)
    if asked == "train":
        from .run import find_recipes
        argv = find_recipes(argv)
    options = parser.parse_args(argv)
    return options.command, options[options.command]


def _add_flops(parser: ArgumentParser) -> None:
    add_pruning(parser)
    add_json(parser)


def _flops(options: Namespace) -> None:
    from .measure import count

    model = model_of(options)
    counts, tokens = count(model), getattr(model, "tokens", None)
    if options.json:
        print(json.dumps({"model": options.model, "tokens": tokens and asdict(tokens), "keep_counts": tokens and model.keep_counts,
                          "heads": scalar(options.heads), "hidden": scalar(options.hidden), **counts.as_dict()}))
        return
    print(f"{options.model}: {counts.params:,} parameters, {counts.macs:,} MACs ({counts.macs / 1e9:.3f} G, fvcore's convention; "
          f"{counts.macs_matmul:,} in matrix products alone; 1 MAC = 2 FLOPs)")
    for kind, n in counts.by_kind.items():
        print(f"  {kind:30}{n:>18,}")


def _add_bench(parser: ArgumentParser) -> None:
    add_pruning(parser, folder=False)
    parser.add_argument("--device", type=str, help="cpu or cuda; by default the GPU where there is one")
    parser.add_argument("--dtype", type=str, nargs="+", default=["float32"], help="float32, bfloat16, float16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--baseline", type=str, nargs="+", default=["eager"],
                        help="dense engines: eager, modules (ours, nothing pruned), packed, compiled, onnxruntime, openvino; "
                             "on a GPU cuda_graph besides")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, at least 5")
    parser.add_argument("--min-time", type=float, default=0.2, help="seconds a round of one engine lasts at least")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--out", type=str, help="also write the JSON document to this file")
    add_json(parser)


def _bench(options: Namespace) -> None:
    import torch

    from . import bench

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"bench: threads must be >= 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.out and not Path(options.out).parent.is_dir():
        raise FileNotFoundError(f"bench: out must be a file in a folder that exists, got {options.out!r}")
    fill_in(options)
    result = bench.bench(options.model, **pruning_of(options), score=options.score, method=options.method, at=options.at,
                         device=device_of(options, "bench"), dtypes=options.dtype, batches=options.batch, baselines=options.baseline,
                         rounds=options.rounds, min_time=options.min_time)
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if options.json else bench.show(result))


def _add_table1(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="batch 1 only")
    parser.add_argument("--data", type=str, help="image folder of the ImageNet validation set, one folder a class (WordNet id)")
    parser.add_argument("--checkpoints", type=str, help="folder of weights, named as `vitprune table1 --json` lists under checkpoint")
    parser.add_argument("--device", type=str, help="cpu or cuda; by default the GPU where there is one")
    add_json(parser)


def _table1(options: Namespace) -> None:
    from . import table1

    result = table1.table1(quick=options.quick, data=options.data, checkpoints=options.checkpoints, device=device_of(options, "table1"))
    if options.json:
        print(json.dumps(result))
    else:
        table1.show(result)


def _add_prune(parser: ArgumentParser) -> None:
    add_pruning(parser)
    add_weights(parser)
    parser.add_argument("--masked", action="store_true", help="keep all weights and skip the pruned ones, instead of removing them")
    parser.add_argument("--output", type=str, required=True, help="folder to write: config.json and model.safetensors")


def _prune(options: Namespace) -> None:
    import vitprune

    if options.tokens is None and options.heads is None and options.hidden is None:
        raise ValueError("prune: --tokens, --heads or --hidden must be given, got none")
    model = model_of(options, compacted=not options.masked)
    vitprune.save(model, options.output)
    print(f"{options.output}: {sum(p.numel() for p in model.parameters()):,} parameters")


def _add_eval(parser: ArgumentParser) -> None:
    add_pruning(parser)
    add_weights(parser)
    parser.add_argument("--data", type=str, required=True, help="an image folder, parquet:PATH, hf:NAME, stream:NAME or digits")
    parser.add_argument("--split", type=str, default="val", help="of the held-out pictures")
    parser.add_argument("--resize", type=int, help="of the shorter side before the crop; by default the model's, 256 for DeiT")
    parser.add_argument("--class-map", type=str, help="JSON file {class name: id}, for names that do not tell their id")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave unreadable pictures out instead of refusing")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", type=str, help="cpu or cuda; by default the GPU where there is one")
    add_json(parser)


def _eval(options: Namespace) -> None:
    from .evaluate import evaluate_source

    device, model = device_of(options, "eval"), model_of(options)
    result = evaluate_source(model, options.data, device, options.batch_size, resize=options.resize,
                             eval_split=options.split, class_map=options.class_map, skip_corrupt=options.skip_corrupt,
                             workers=options.workers)
    print(json.dumps({"model": options.model, **result}) if options.json
          else f"{options.model}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, {result['count']} pictures")


def _add_show(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="folder written by `vitprune prune` or `vitprune train`")
    parser.add_argument("pictures", type=str, nargs="*", help="pictures whose kept patches are drawn")
    parser.add_argument("--metrics", type=str, help="metrics.jsonl of a training run, for its curves")
    parser.add_argument("--output", type=str, default="show.html")


def _show(options: Namespace) -> None:
    import vitprune

    from .show import show

    show(vitprune.load(options.model), options.pictures, options.output, options.metrics)
    print(f"{options.output}: {len(options.pictures)} pictures")


def _add_export(parser: ArgumentParser) -> None:
    add_pruning(parser)
    add_weights(parser)
    parser.add_argument("--output", type=str, required=True, help="ONNX file to write")


def _export(options: Namespace) -> None:
    import torch

    from .engine import check_onnx, export_onnx
    from .measure import image_size

    if options.score == "random":
        raise ValueError("export: score must not be 'random': a file whose tokens are drawn anew cannot be checked against the model")
    model = model_of(options)
    images = torch.randn(2, *image_size(model), generator=torch.Generator().manual_seed(0))
    path = export_onnx(model, options.output, images)
    difference = check_onnx(path, model, images)
    if difference > 1e-3:
        path.unlink()
        raise RuntimeError(f"export: ONNX Runtime's logits differ from the model's by {difference:.1e} of the largest; nothing is written")
    print(f"{path}: any batch size; ONNX Runtime's logits differ by {difference:.1e} of the largest")


def _add_train(parser: ArgumentParser) -> None:
    from .blocks import BlockPruning
    from .data import DataConfig
    from .learned import Cubic
    from .run import RunConfig
    from .tokens import TokenPruning
    from .train import TrainConfig

    groups = {"": RunConfig, "data": DataConfig, "train": TrainConfig, "tokens": TokenPruning, "blocks": BlockPruning,
              "blocks.schedule": Cubic}
    parser.epilog = "\n\n".join(f"--{name}.*: {getdoc(cls)}" if name else getdoc(cls) for name, cls in groups.items())
    parser.add_argument("--config", action="config", help="YAML file, or the name of a recipe that comes with the package")
    parser.add_class_arguments(RunConfig)


def _train(options: Namespace) -> int:
    from .run import RunConfig, main

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(RunConfig)
    options.pop("config", None)
    return main(RunConfig(**vars(parser.instantiate(options))))


def _add_demo(parser: ArgumentParser) -> None:
    from .demo import DemoConfig

    hints = get_type_hints(DemoConfig)
    for field in fields(DemoConfig):
        kind = {"action": "store_true"} if hints[field.name] is bool else {"type": hints[field.name], "default": field.default}
        parser.add_argument("--" + field.name.replace("_", "-"), **kind)


def _demo(options: Namespace) -> None:
    from .demo import DemoConfig
    from .demo import main as demo

    demo(DemoConfig(**options.as_dict()))


def _add_tune(parser: ArgumentParser) -> None:
    from .tune import add_arguments

    add_arguments(parser)
    add_json(parser)


def _tune(options: Namespace) -> None:
    from .tune import main as tune

    tune(device_of(options, "tune"), options.quick, options.budget, options.json)


def _doctor(options: Namespace) -> int | None:
    from .doctor import main as doctor

    return doctor(json=options.json)


COMMANDS: dict[str, tuple[str, Callable, Callable]] = {
    "train": ("train, prune and distil as a configuration says", _add_train, _train),
    "demo": ("train, prune and time small models on this machine; writes a report", _add_demo, _demo),
    "prune": ("prune a timm model and save it", _add_prune, _prune),
    "eval": ("top-1 and top-5 on an image folder, a parquet file or a Hugging Face dataset", _add_eval, _eval),
    "flops": ("parameters and multiply-accumulates", _add_flops, _flops),
    "bench": ("dense against pruned, interleaved, on this machine", _add_bench, _bench),
    "table1": ("the paper's Table 1: printed, true, measured here", _add_table1, _table1),
    "show": ("pictures of what a pruned model keeps, and of how it was trained", _add_show, _show),
    "export": ("write an ONNX file and check it", _add_export, _export),
    "doctor": ("what can run on this machine, and why the rest cannot", add_json, _doctor),
    "tune": ("choose the fastest backends on this card, in a few minutes", _add_tune, _tune),
}
