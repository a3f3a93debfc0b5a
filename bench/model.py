"""Dense against pruned models on this machine: `python bench/model.py`, or `vitprune bench` for one of your own.

Writes bench/results/model_DEVICE.json; `python -m bench.render` puts it into the tables.
"""
import argparse
import json
from pathlib import Path

from vitprune import bench

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224")
PRUNING = ({"tokens": 0.7}, {"heads": 0.5, "hidden": 0.5}, {"tokens": 0.7, "heads": 0.5, "hidden": 0.5})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--baseline", nargs="+", default=["eager", "modules", "packed", "compiled", "onnxruntime", "openvino"])
    options = parser.parse_args()
    out = Path(__file__).parent / "results" / f"model_{options.device}.json"
    out.parent.mkdir(exist_ok=True)
    results = []
    for model in options.models:
        for pruning in PRUNING:
            results.append(bench.bench(model, **pruning, device=options.device, dtypes=options.dtype, batches=options.batch,
                                       baselines=options.baseline))
            print(bench.show(results[-1]), flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n")  # after every model: a long run that is stopped leaves its part


if __name__ == "__main__":
    main()
