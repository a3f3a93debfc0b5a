"""Put the committed results into the README: `python bench/render.py` rewrites what is between `<!-- NAME -->` and `<!-- /NAME -->`.

NAME is a file bench/results/NAME.json written by bench/model.py.
"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def table(results: list[dict]) -> str:
    m = results[0]["machine"]
    lines = [f"{m.get('gpu', m.get('cpu'))}, {m['threads']} threads, torch {m['torch']}, timm {m['timm']}; medians of interleaved rounds. "
             "Realised: speed-up over MAC ratio. Best dense: the fastest dense engine of that row.", "",
             "| model | pruned | dtype | batch | plain dense ms | plain pruned ms | speed-up | MAC ratio | realised | best dense "
             "| its ms | same engine pruned ms |",
             "|-|-|-|-|-|-|-|-|-|-|-|-|"]
    for result in results:
        what = ", ".join(f"{k} {result[k]}" for k in ("tokens", "heads", "hidden") if result[k] is not None)
        for row in result["rows"]:
            if row["baseline"] != "eager":
                continue
            best = next(r for r in result["rows"] if r["fastest"] and (r["dtype"], r["batch"]) == (row["dtype"], row["batch"]))
            same = f"{best['pruned_ms']:.2f}" if best["pruned_engine"] == best["baseline"] else "-"
            lines.append(f"| {result['model']} | {what} | {row['dtype']} | {row['batch']} | {row['dense_ms']:.2f} "
                         f"| {row['pruned_ms']:.2f} | {row['speedup']:.2f} | {row['flops_ratio']:.2f} | {row['realised_gain']:.2f} "
                         f"| {best['baseline']} | {best['dense_ms']:.2f} | {same} |")
    return "\n".join(lines)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for path in sorted((ROOT / "bench" / "results").glob("model_*.json")):
        block = re.compile(rf"(<!-- {path.stem} -->\n).*?(<!-- /{path.stem} -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"README.md has no <!-- {path.stem} --> ... <!-- /{path.stem} --> to fill")
        text = block.sub(lambda found, path=path: found[1] + table(json.loads(path.read_text())) + "\n" + found[2], text)
    readme.write_text(text)


if __name__ == "__main__":
    main()
