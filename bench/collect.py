"""Check a file that bench/card.py wrote, put it among the committed results and into the README: `python -m bench.collect FILE`.

The file may come from anybody's machine: every number must be finite, every name that is printed plain, every version there.
"""
import json
import math
import re
import sys
from datetime import datetime
from pathlib import Path

from bench import render
from bench.card import FORMAT
from vitprune import nvrtc
from vitprune.ops import dispatch

PLAIN = re.compile(r"[\w .,:;()/@+%*-]{1,120}", re.ASCII)  # what is printed in a table: no markup
VERSIONS = ("platform", "python", "torch", "timm", "vitprune")
FIELDS = {"name": str, "device": str, "date": str, "machine": dict, "seconds": float, "budget": float, "idle_clocks": dict, "jobs": list}
JOB = {"name": str, "kind": str, "seconds": float, "clocks": dict, "rows": list}
OPERATOR = {"dtype": str, "ms": dict, "spread_ms": dict}
SHARES = {"model": str, "batch": float, "share": dict}
MODEL = {"model": str, "machine": dict, "rows": list}
MODEL_ROW = {"batch": float, "dtype": str, "baseline": str, "pruned_engine": str, "dense_ms": float, "pruned_ms": float, "speedup": float,
             "flops_ratio": float, "realised_gain": float, "fastest": bool}


def fail(where: str, expected: str, got) -> None:
    raise ValueError(f"{where} must be {expected}, got {got!r:.80}")


def check(data) -> dict:
    """The contents of such a file. Raises ValueError naming the field that is wrong."""
    isinstance(data, dict) or fail("the file", "a JSON object", data)
    data.get("format") == FORMAT or fail("format", f"{FORMAT}", data.get("format"))
    _fields("", data, FIELDS)
    _finite("", data)
    _plain("name", data["name"])
    data["device"] in ("cpu", "cuda") or fail("device", "cpu or cuda", data["device"])
    try:
        datetime.fromisoformat(data["date"])
    except ValueError:
        fail("date", "an ISO date", data["date"])
    _machine("machine", data["machine"], data["device"])
    data["jobs"] or fail("jobs", "a list with at least one job", data["jobs"])
    for i, job in enumerate(data["jobs"]):
        _job(f"jobs[{i}]", job, data["device"])
    return data


def _job(where: str, job, device: str) -> None:
    _fields(where, job, JOB)
    _plain(f"{where}.name", job["name"])
    job["kind"] in ("operator", "model", "shares") or fail(f"{where}.kind", "operator, model or shares", job["kind"])
    for field in ("cut", "error"):
        job.get(field) is None or isinstance(job[field], str) or fail(f"{where}.{field}", "null or a text", job[field])
    for name, value in job["clocks"].items():
        (isinstance(value, list) and len(value) == 3 and all(map(_number, value))) or fail(
            f"{where}.clocks.{name}", "[least, median, most]", value)
    for i, row in enumerate(job["rows"]):
        at = f"{where}.rows[{i}]"
        if job["kind"] == "model":
            _fields(at, row, MODEL)
            _plain(f"{at}.model", row["model"])
            _machine(f"{at}.machine", row["machine"], device)
            for name in ("tokens", "heads", "hidden"):
                row.get(name) is None or _number(row[name]) or fail(f"{at}.{name}", "null or a number", row.get(name))
            row["rows"] or fail(f"{at}.rows", "a list with at least one row", row["rows"])
            for j, one in enumerate(row["rows"]):
                _fields(f"{at}.rows[{j}]", one, MODEL_ROW)
                for name, value in one.items():
                    if isinstance(value, str):
                        _plain(f"{at}.rows[{j}].{name}", value)
            for one in row["rows"]:
                fastest = sum(r["fastest"] for r in row["rows"] if (r["dtype"], r["batch"]) == (one["dtype"], one["batch"]))
                fastest == 1 or fail(f"{at}.rows", f"one fastest of {one['dtype']}, batch {one['batch']}", fastest)
            continue
        _fields(at, row, OPERATOR | SHARES if job["kind"] == "shares" else OPERATOR)
        for name in ("dtype", "pass", "op", "model"):
            _plain(f"{at}.{name}", row.get(name, "x"))
        for name, value in row["ms"].items():
            _plain(f"{at}.ms", name)
            (_number(value) and value > 0) or fail(f"{at}.ms.{name}", "a number > 0", value)
            spread = row["spread_ms"].get(name)
            (isinstance(spread, list) and len(spread) == 2 and all(map(_number, spread)) and spread[0] <= value <= spread[1]) or fail(
                f"{at}.spread_ms.{name}", "[least, most] around the median", spread)
        alone = row.get("gpu_ms", {})
        (isinstance(alone, dict) and all(_number(t) and t > 0 and name in row["ms"] for name, t in alone.items())) or fail(
            f"{at}.gpu_ms", "numbers > 0 for names in ms", alone)


def _machine(where: str, machine: dict, device: str) -> None:
    for name in (*VERSIONS, *(("gpu", "cuda") if device == "cuda" else ("cpu",)), *(["triton"] if "triton" in machine else [])):
        isinstance(machine.get(name), str) or fail(f"{where}.{name}", "a text", machine.get(name))
        _plain(f"{where}.{name}", machine[name])
    _number(machine.get("threads")) or fail(f"{where}.threads", "a number", machine.get("threads"))


def _fields(where: str, value, fields: dict) -> None:
    isinstance(value, dict) or fail(where, "an object", value)
    for name, kind in fields.items():
        got = value.get(name)
        (_number(got) if kind is float else isinstance(got, kind)) or fail(f"{where}.{name}".lstrip("."), f"a {kind.__name__}", got)


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(where: str, value) -> None:
    (isinstance(value, str) and PLAIN.fullmatch(value)) or fail(where, "a plain text", value)


def _finite(where: str, value) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        fail(where, "a finite number", value)
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _finite(f"{where}[{name}]" if isinstance(value, list) else f"{where}.{name}".lstrip("."), inner)


def collect(path: Path) -> Path:
    """Check, copy and render; the newer of two files of one card stays. Returns where the file is now."""
    try:
        data = check(json.loads(path.read_text()))
        target = render.RESULTS / f"card-{dispatch.slug(data['name'])}.json"
        if target.exists() and (old := json.loads(target.read_text())["date"]) > data["date"]:
            raise ValueError(f"date must not be before that of {target.name}, {old}, got {data['date']!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: {error}") from error
    nvrtc.write(target, (json.dumps(data, indent=1) + "\n").encode())
    target.chmod(0o644)
    render.main()
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(collect(Path(sys.argv[1])))
