"""Put the committed results into README.md and bench/README.md: `python -m bench.render` rewrites what is between
`<!-- NAME -->` and `<!-- /NAME -->`.

NAME is a file bench/results/NAME.json written by bench/model.py, `cards`: all files card-*.json written by bench/card.py,
`gains`: whole models of both, in short, `targets`: of bench/targets.py, or `choices`: the files in kernels/configs.
"""
import argparse
import json
import re
import statistics
from datetime import datetime, timezone
from pathlib import Path

from bench import targets

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
OURS = ("triton", "cuda", "cpp", "split", "vitprune")  # a name's first word; the rest are baselines
NO_RIVALS = ("copy", "norm", "unmasked")  # first words of what does less: measures of the card, attention without a policy


def table(results: list[dict]) -> str:
    m = results[0]["machine"]
    lines = [f"{m.get('gpu', m.get('cpu'))}, {m['threads']} threads, torch {m['torch']}, timm {m['timm']}; medians of interleaved rounds. "
             "Realised: speed-up over MAC ratio. Best: the fastest engine of that row, of either model.", "",
             "| model | pruned | dtype | batch | plain dense ms | plain pruned ms | speed-up | MAC ratio | realised | best dense "
             "| its ms | best pruned | its ms | best over best |",
             "|-|-|-|-|-|-|-|-|-|-|-|-|-|-|"]
    for result in results:
        for row in result["rows"]:
            if row["baseline"] != "eager":
                continue
            alike = [r for r in result["rows"] if (r["dtype"], r["batch"]) == (row["dtype"], row["batch"])]
            best, pruned = next(r for r in alike if r["fastest"]), min(alike, key=lambda r: r["pruned_ms"])
            lines.append(f"| {result['model']} | {_pruned(result)} | {row['dtype']} | {row['batch']} | {row['dense_ms']:.2f} "
                         f"| {row['pruned_ms']:.2f} | {row['speedup']:.2f} | {row['flops_ratio']:.2f} | {row['realised_gain']:.2f} "
                         f"| {best['baseline']} | {best['dense_ms']:.2f} | {pruned['pruned_engine']} | {pruned['pruned_ms']:.2f} "
                         f"| {best['dense_ms'] / pruned['pruned_ms']:.2f} |")
    return "\n".join(lines)


def card(data: dict) -> str:
    """One card: its operators beside the fastest baseline of every shape, and whole models."""
    m, operators = data["machine"], [job for job in data["jobs"] if job["kind"] == "operator"]
    versions = ", ".join(f"{k} {m[k]}" for k in ("cuda", "torch", "triton", "timm", "vitprune") if k in m)
    lines = [f"**{data['name']}**, {versions}; {data['date'][:10]}, {data['seconds']:.0f} s{_clocks(data)}. Speed-up: geometric mean "
             "(least to most) over the shapes of the time of the fastest baseline of each shape over ours; on the GPU alone: without what "
             "the host takes, with a cold cache. Of a model: what the operator takes of its forward pass, or of its training step, at the "
             "largest batch timed.", "",
             "| operator | dtype | pass | shapes | ours | speed-up | ours is fastest | fastest baselines | speed-up on the GPU alone "
             "| of a model |",
             "|-|-|-|-|-|-|-|-|-|-|"]
    models = [row for job in data["jobs"] if job["kind"] == "shares" for row in job["rows"]]
    for job in operators:
        groups: dict[tuple, list[dict]] = {}
        for row in job["rows"]:
            groups.setdefault((row.get("op", job["name"]), row["dtype"], row.get("pass", "forward")), []).append(row)
        lines += [f"| `{op}` | {dtype} | {direction} | {len(rows)} | {_compare([r['ms'] for r in rows])} "
                  f"| {_compare([r['gpu_ms'] for r in rows if 'gpu_ms' in r]).split(' | ')[1]} | {_share(op, direction, models)} |"
                  for (op, dtype, direction), rows in groups.items()]
    lines += shares(models)
    stopped = [f"{job['name']} ({len(job['rows'])} rows)" for job in data["jobs"] if job.get("cut") or job.get("error")]
    lines += ["", f"Not finished in time, or failed: {', '.join(stopped)}."] if stopped else []
    models = [row for job in data["jobs"] if job["kind"] == "model" for row in job["rows"]]
    return "\n".join([*lines, "", table(models)] if models else lines)


def shares(rows: list[dict]) -> list[str]:
    """What each operator takes of a pruned model's forward pass and training step."""
    if not rows:
        return []
    of = {id(row): sorted(row["share"].items(), key=lambda pair: -pair[1]) for row in rows}
    return ["", "| tokens 0.7, half of the blocks masked | dtype | batch | pass | ms | share of each operator |", "|-|-|-|-|-|-|",
            *(f"| {row['model']} | {row['dtype']} | {row['batch']} | {row['pass']} | {row['ms']['all']:.1f} "
              f"| {', '.join(f'{op} {share:.1%}' for op, share in of[id(row)])} |" for row in rows)]


def _share(op: str, direction: str, rows: list[dict]) -> str:
    """An operator's share of each model, from the rows of `shares`: of a training step where it is timed with its gradient."""
    what, name = "forward" if direction == "forward" else "training step", op.split(",")[0]
    found = {row["model"]: row["share"] for row in sorted(rows, key=lambda row: row["batch"]) if row["pass"] == what}
    return ", ".join(f"{model.removesuffix('_patch16_224')} {share[name]:.1%}" for model, share in found.items() if name in share) or "-"


def _compare(rows: list[dict[str, float]]) -> str:
    """Columns: our backends, speed-up, in how many shapes ours is fastest, the fastest baselines."""
    shares, names, rivals = [], [], []
    for ms in rows:
        ours = {n: t for n, t in ms.items() if n.split()[0] in OURS}
        others = {n: t for n, t in ms.items() if n not in ours and n.split()[0] not in NO_RIVALS}
        if others:
            rivals.append(min(others, key=others.get))
        if ours and others:
            names.append(min(ours, key=ours.get))
            shares.append(min(others.values()) / min(ours.values()))
    baselines = ", ".join(dict.fromkeys(rivals)) or "-"
    if not shares:
        return f"- | - | - | {baselines}"
    won = sum(share > 1 for share in shares)
    return (f"{', '.join(dict.fromkeys(names))} | {statistics.geometric_mean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) "
            f"| {won} of {len(shares)} | {baselines}")


def _clocks(data: dict) -> str:
    """The median clock under load, over all jobs."""
    for name, unit in (("sm_mhz", "MHz"), ("cpu_mhz", "MHz")):
        found = [job["clocks"][name][1] for job in data["jobs"] if name in job["clocks"]]
        if found:
            return f", {statistics.median(found):.0f} {unit} under load"
    return ""


def cards() -> str:
    found = sorted(RESULTS.glob("card-*.json"))
    return "\n\n".join(card(json.loads(path.read_text())) for path in found) or "No card has been measured yet."


def choices(data: dict) -> str:
    """Which backend serves, from a file of kernels/configs: a row an operator, a column a mode and pass."""
    modes = {(False, False): "eager, forward", (False, True): "eager, with gradient", (True, False): "CUDA graph, forward",
             (True, True): "CUDA graph, with gradient"}
    found: dict[str, dict] = {}
    for choice in data["choices"]:
        facts = choice["facts"]
        row = choice["op"] + "".join(f", {form}" for form in ("packed", "dense") if facts.get(form))
        cell = found.setdefault(row, {}).setdefault((facts.get("graph", False), facts.get("grad", False)), {})
        cell[choice["dtype"], {True: "large", False: "small", None: ""}[facts.get("large")]] = choice["backend"]
    lines = [f"| {data['card']} | " + " | ".join(modes.values()) + " |", "|-" * (len(modes) + 1) + "|"]
    lines += [f"| `{row}` | " + " | ".join(words(cells[mode]) if mode in cells else "–" for mode in modes) + " |"
              for row, cells in sorted(found.items())]
    return "\n".join(lines)


def words(cell: dict[tuple[str, str], str]) -> str:
    """{(dtype, size): backend} in as few words as tell them apart."""
    if len({*cell.values()}) == 1:
        return next(iter(cell.values()))
    kinds: dict[str, list[str]] = {}  # what serves by size -> dtypes
    for kind in dict.fromkeys(kind for kind, _ in cell):
        sizes = {size: backend for (k, size), backend in sorted(cell.items(), reverse=True) if k == kind}
        same = len({*sizes.values()}) == 1
        kinds.setdefault(next(iter(sizes.values())) if same else ", ".join(f"{s} {b}" for s, b in sizes.items()), []).append(kind)
    named = {text: "16 bits" if {*some} == {"float16", "bfloat16"} else ", ".join(some) for text, some in kinds.items()}
    return next(iter(named)) if len(named) == 1 else "; ".join(f"{some}: {text}" for text, some in named.items())


def gains() -> str:
    """Whole models in short, of each machine's newest file, one that was not cut if there is one: the fastest engine of the pruned one
    beside the fastest of the dense one."""
    newest: dict[str, tuple[tuple[bool, datetime], list[dict]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        data, whole = json.loads(path.read_text()), True
        if path.name.startswith("model_"):  # of bench/model.py
            date, models = None, data
        elif path.name.startswith("models_"):  # what a later run on that card measured anew
            date, models = data["date"], [model | {"machine": data["machine"]} for model in data["models"]]
        elif path.name.startswith("card-"):
            jobs = [job for job in data["jobs"] if job["kind"] == "model"]
            date, models, whole = data["date"], [row for job in jobs for row in job["rows"]], not any(job["cut"] for job in jobs)
        else:
            continue
        if models:
            machine = models[0]["machine"]
            name = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('cpu_capability')}"
            rank = whole, datetime.fromisoformat(date) if date else datetime.min.replace(tzinfo=timezone.utc)
            if name not in newest or rank >= newest[name][0]:
                newest[name] = rank, models
    return "\n\n".join(_gains(name, models) for name, (_, models) in sorted(newest.items())) or "Nothing has been measured yet."


def _gains(name: str, models: list[dict]) -> str:
    machine = models[0]["machine"]
    rows = [(model, row) for model in models for row in model["rows"]]
    batches = sorted({row["batch"] for _, row in rows})
    lines = [f"{name}, {machine['threads']} threads, torch {machine['torch']}, timm {machine['timm']}:", "",
             "| model | pruned | dtype | MAC ratio | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
             "|-" * (len(batches) + 4) + "|"]
    for dtype in dict.fromkeys(row["dtype"] for _, row in rows):
        for model in models:
            cells = [_gain([row for row in model["rows"] if (row["dtype"], row["batch"]) == (dtype, batch)]) for batch in batches]
            lines.append(f"| {model['model'].removesuffix('_patch16_224')} | {_pruned(model)} | {dtype} "
                         f"| {model.get('flops_ratio') or model['rows'][0]['flops_ratio']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gain(rows: list[dict]) -> str:
    if not rows:
        return "–"
    dense, pruned = min(row["dense_ms"] for row in rows), min(row["pruned_ms"] for row in rows)
    return f"**{dense / pruned:.2f}** ({_ms(dense)} to {_ms(pruned)} ms)"


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _pruned(model: dict) -> str:
    return ", ".join(f"{what} {model[what]}" for what in ("tokens", "heads", "hidden") if model[what] is not None)


def resources(data: dict) -> str:
    """Registers and shared memory of each kernel by architecture; spills where there are any."""
    archs = sorted({arch for row in data["kernels"].values() for arch in row}, key=int)
    lines = [f"Triton {data['triton']}, DeiT-S, float16, batch {data['batch']}, 197 tokens, half of the blocks live.", "",
             f"| kernel | {' | '.join(f'{int(arch) // 10}.{int(arch) % 10}' for arch in archs)} |", "|-" * (len(archs) + 1) + "|"]
    for name, row in data["kernels"].items():
        took = [row.get(arch) for arch in archs]
        cells = [f"{t[0]}, {t[2] / 1024:.3g}" + (f", {t[1]} B spilled" if t[1] else "") if t else "–" for t in took]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    shipped = "\n\n".join(choices(json.loads(path.read_text())) for path in sorted((ROOT / "kernels/configs").glob("*.json")))
    blocks = {path.stem: table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("model_*.json"))}
    blocks |= {"cards": cards(), "gains": gains()} | ({"choices": shipped} if shipped else {})
    if (RESULTS / "kernels_nvidia_h200.json").exists():  # of one card alone
        blocks["targets"] = targets.table(RESULTS)
    if (RESULTS / "resources.json").exists():
        blocks["resources"] = resources(json.loads((RESULTS / "resources.json").read_text()))
    texts = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "bench" / "README.md")}
    for name, content in blocks.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        path = next((path for path, text in texts.items() if block.search(text)), None)
        if path is None:
            raise SystemExit(f"neither README.md nor bench/README.md has <!-- {name} --> ... <!-- /{name} --> to fill")
        texts[path] = block.sub(lambda found, content=content: found[1] + content + "\n" + found[2], texts[path])
    for path, text in texts.items():
        path.write_text(text)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
