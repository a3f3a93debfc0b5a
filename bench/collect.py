"""Check a file that bench/card.py wrote, put it among the committed results and into the tables: `python -m bench.collect FILE`.

The file may come from anybody's machine: every number must be finite and in its range, every name that is printed plain, every version
there, and the card that of the machine.
"""
import json
import math
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

from bench import render
from bench.card import FORMAT, jobs, kind_of
from vitprune import nvrtc
from vitprune.bench import DTYPES
from vitprune.ops import dispatch

PLAIN = re.compile(r"(?! )[\w .,:;()/@+%*-]{1,120}(?<! )", re.ASCII)  # what is printed in a table: no markup
VERSIONS = ("platform", "python", "torch", "timm", "vitprune")
POSITIVE = "a number > 1e-9 and < 1e9"  # a float, here
FIELDS = {"name": str, "device": str, "date": str, "machine": dict, "seconds": float, "budget": float, "idle_clocks": dict, "jobs": list}
JOB = {"name": str, "kind": str, "clocks": dict, "rows": list}
OPERATOR = {"dtype": str, "ms": dict, "spread_ms": dict}
SHARES = {"model": str, "batch": float, "pass": str, "share": dict}
MODEL = {"model": str, "machine": dict, "rows": list}
MODEL_ROW = {"batch": float, "dtype": str, "baseline": str, "pruned_engine": str, "dense_ms": float, "pruned_ms": float, "speedup": float,
             "flops_ratio": float, "realised_gain": float, "fastest": bool}


def fail(where: str, expected: str, got) -> None:
    raise ValueError(f"{where} must be {expected}, got {got!r:.80}")


def check(data) -> dict:
    """The contents of such a file. Raises ValueError naming the field that is wrong."""
    isinstance(data, dict) or fail("the file", "a JSON object", data)
    data.get("format") == FORMAT or fail("format", f"{FORMAT}", data.get("format"))
    _finite("", data)
    _fields("", data, FIELDS)
    data["device"] in ("cpu", "cuda") or fail("device", "cpu or cuda", data["device"])
    _when(data["date"])
    _machine("machine", data["machine"], data)
    dispatch.slug(data["name"]) or fail("name", "a text with letters or digits", data["name"])
    data["jobs"] or fail("jobs", "a list with at least one job", data["jobs"])
    for i, job in enumerate(data["jobs"]):
        _job(f"jobs[{i}]", job, data)
    names = [job["name"] for job in data["jobs"]]
    len({*names}) == len(names) or fail("jobs", "each once", names)
    return data


def _job(where: str, job, data: dict) -> None:
    _fields(where, job, JOB)
    job["name"] in jobs() or fail(f"{where}.name", f"one of {', '.join(jobs())}", job["name"])
    job["kind"] == kind_of(job["name"]) or fail(f"{where}.kind", kind_of(job["name"]), job["kind"])
    (_number(job.get("seconds")) and job["seconds"] >= 0) or fail(f"{where}.seconds", "a number >= 0", job.get("seconds"))
    for field in ("cut", "error"):
        job.get(field) is None or isinstance(job[field], str) or fail(f"{where}.{field}", "null or a text", job[field])
    for name, value in job["clocks"].items():
        (isinstance(value, list) and len(value) == 3 and all(map(_number, value)) and 0 <= value[0] <= value[1] <= value[2] < 1e5) or fail(
            f"{where}.clocks.{name}", "[least, median, most] in 0..1e5", value)
    for i, row in enumerate(job["rows"]):
        at = f"{where}.rows[{i}]"
        if job["kind"] == "model":
            _fields(at, row, MODEL)
            _plain(f"{at}.model", row["model"])
            _machine(f"{at}.machine", row["machine"], data)
            for name in ("tokens", "heads", "hidden"):
                row.get(name, -1) is None or _share(row.get(name)) or fail(f"{at}.{name}", "null or in 0..1", row.get(name))
            row["rows"] or fail(f"{at}.rows", "a list with at least one row", row["rows"])
            for j, one in enumerate(row["rows"]):
                _fields(f"{at}.rows[{j}]", one, MODEL_ROW)
                for name, value in one.items():
                    if isinstance(value, str):
                        _plain(f"{at}.rows[{j}].{name}", value)
            for j, one in enumerate(row["rows"]):
                alike = [r for r in row["rows"] if (r["dtype"], r["batch"]) == (one["dtype"], one["batch"])]
                fastest = [r["dense_ms"] for r in alike if r["fastest"]]
                fastest == [min(r["dense_ms"] for r in alike)] or fail(
                    f"{at}.rows", f"one fastest of {one['dtype']}, batch {one['batch']}, that with the least dense_ms", fastest)
                for name, value in (("speedup", one["dense_ms"] / one["pruned_ms"]),
                                    ("realised_gain", one["speedup"] / one["flops_ratio"])):
                    math.isclose(one[name], value, rel_tol=0.01) or fail(f"{at}.rows[{j}].{name}", f"about {value:.3g}", one[name])
                one["dtype"] in DTYPES or fail(f"{at}.rows[{j}].dtype", f"one of {', '.join(DTYPES)}", one["dtype"])
            continue
        _fields(at, row, OPERATOR | SHARES if job["kind"] == "shares" else OPERATOR)
        row["dtype"] in DTYPES or fail(f"{at}.dtype", f"one of {', '.join(DTYPES)}", row["dtype"])
        for name in ("pass", "op", "model"):
            _plain(f"{at}.{name}", row.get(name, "x"))
        for name, value in row["ms"].items():
            _plain(f"{at}.ms", name)
            _positive(value) or fail(f"{at}.ms.{name}", POSITIVE, value)
            spread = row["spread_ms"].get(name)
            (isinstance(spread, list) and len(spread) == 2 and all(map(_number, spread)) and spread[0] <= value <= spread[1]) or fail(
                f"{at}.spread_ms.{name}", "[least, most] around the median", spread)
        alone = row.get("gpu_ms", {})
        (isinstance(alone, dict) and all(_positive(t) and name in row["ms"] for name, t in alone.items())) or fail(
            f"{at}.gpu_ms", "numbers > 0 for names in ms", alone)
        if job["kind"] == "shares":
            "all" in row["ms"] or fail(f"{at}.ms", "with that of all", row["ms"])
            all(name in row["ms"] and _share(part) for name, part in row["share"].items()) or fail(
                f"{at}.share", "in 0..1 for names in ms", row["share"])


def _machine(where: str, machine: dict, data: dict) -> None:
    """A GPU's file is of that GPU, a CPU's of a machine where none was seen."""
    own, *more = ("gpu", "cuda") if data["device"] == "cuda" else ("cpu",)
    more or not {"gpu", "cuda"} & machine.keys() or fail(where, "without gpu and cuda where device is cpu", machine)
    for name in (*VERSIONS, own, *more, *(["triton"] if "triton" in machine else [])):
        isinstance(machine.get(name), str) or fail(f"{where}.{name}", "a text", machine.get(name))
        _plain(f"{where}.{name}", machine[name])
    machine[own] == data["name"] or fail(f"{where}.{own}", f"the file's name, {data['name']}", machine[own])
    _positive(machine.get("threads")) or fail(f"{where}.threads", POSITIVE, machine.get("threads"))


def _fields(where: str, value, fields: dict) -> None:
    isinstance(value, dict) or fail(where, "an object", value)
    for name, kind in fields.items():
        got = value.get(name)
        (_positive(got) if kind is float else isinstance(got, kind)) or fail(
            f"{where}.{name}".lstrip("."), POSITIVE if kind is float else f"a {kind.__name__}", got)


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value) -> bool:
    return _number(value) and 1e-9 < value < 1e9


def _share(value) -> bool:
    return _number(value) and 0 <= value <= 1


def _when(date: str) -> datetime:
    try:
        when = datetime.fromisoformat(date)
    except ValueError:
        when = None
    return when if when and when.tzinfo else fail("date", "an ISO date with its time zone", date)


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
        _when(data["date"]) <= datetime.now(timezone.utc) or fail("date", "not after now", data["date"])
        render.card(data)
        if target.exists() and _when(old := check(json.loads(target.read_text()))["date"]) > _when(data["date"]):
            raise ValueError(f"date must not be before that of {target.name}, {old}, got {data['date']!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: {error}") from error
    nvrtc.write(target, (json.dumps(data, indent=1) + "\n").encode())
    target.chmod(0o644)
    render.main()
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    print(collect(Path(sys.argv[1])))
