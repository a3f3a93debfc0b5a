"""A card's file: written in parts within a budget, checked field by field, and rendered."""
import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from bench import card, collect, render, targets  # noqa: E402

MACHINE = {"platform": "Linux-6", "python": "3.12.1", "torch": "2.15.0+cu132", "timm": "1.0.31", "vitprune": "0.1.0", "triton": "3.9.0",
           "gpu": "Tesla T4", "cuda": "13.2", "threads": 2}


def operator(dtype: str, **ms: float) -> dict:
    return {"B": 1, "dtype": dtype, "pass": "forward", "bytes": 1, "macs": 0, "ms": ms, "unavailable": {},
            "spread_ms": {n: [t / 2, t * 2] for n, t in ms.items()}}


def model(**change) -> dict:
    row = {"batch": 1, "dtype": "float16", "baseline": "eager", "pruned_engine": "eager", "dense_ms": 4.0, "pruned_ms": 2.0, "speedup": 2.0,
           "flops_ratio": 1.6, "realised_gain": 1.25, "fastest": True}
    return {"model": "deit_small_patch16_224", "tokens": 0.7, "heads": None, "hidden": None, "machine": MACHINE, "rows": [row | change]}


def shared(**change) -> dict:
    return operator("float32", all=4.0, add_norm=1.0) | {"model": "deit_small_patch16_224", "calls": {"add_norm": 12},
                                                         "share": {"add_norm": 0.25}, "batch": 1} | change


def good() -> dict:
    job = {"seconds": 9.0, "cut": None, "error": None, "clocks": {"sm_mhz": [300.0, 1590.0, 1590.0]}}
    rows = [operator("float16", eager=4.0, compiled=2.0, triton=1.0, copy=0.1), operator("float16", eager=1.0, triton=2.0)]
    rows[0]["gpu_ms"] = {"eager": 3.0, "compiled": 1.5, "triton": 1.0, "copy": 0.1}
    return copy.deepcopy({
        "format": 1, "name": "Tesla T4", "device": "cuda", "date": "2025-11-23T21:00:00+00:00", "machine": MACHINE, "budget": 570.0,
        "seconds": 400.0, "idle_clocks": {"sm_mhz": 300.0},
        "jobs": [job | {"name": "deit_small_patch16_224", "kind": "model", "rows": [model()]},
                 job | {"name": "add_norm", "kind": "operator", "cut": "stopped after 40 s", "rows": rows},
                 job | {"name": "shares", "kind": "shares", "rows": [shared()]}]})


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """READMEs with markers and an empty folder of results."""
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "RESULTS", tmp_path / "bench" / "results")
    render.RESULTS.mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- gains -->\n<!-- /gains -->\n")
    (tmp_path / "bench" / "README.md").write_text("before\n<!-- cards -->\n<!-- /cards -->\nafter\n")
    return tmp_path


def write(folder: Path, data) -> Path:
    path = folder / "sent.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_merged_and_rendered_idempotently(tree):
    target = collect.collect(write(tree, good()))
    assert target == tree / "bench" / "results" / "card-tesla-t4.json"
    assert json.loads(target.read_text()) == good()
    text = (tree / "bench" / "README.md").read_text()
    assert text.startswith("before\n<!-- cards -->\n**Tesla T4**, cuda 13.2, torch 2.15.0+cu132, triton 3.9.0")
    assert "1590 MHz under load" in text
    assert "| deit_small_patch16_224 | float32 | 1 | forward | 4.0 | add_norm 25.0% |" in text
    assert ("| `add_norm` | float16 | forward | 2 | triton | 1.00 (0.50 to 2.00) | 1 of 2 | compiled, eager | 1.50 (1.50 to 1.50) "
            "| deit_small 25.0% |") in text
    assert "Not finished in time, or failed: add_norm (2 rows)." in text
    assert ("| deit_small_patch16_224 | tokens 0.7 | float16 | 1 | 4.00 | 2.00 | 2.00 "
            "| 1.60 | 1.25 | eager | 4.00 | eager | 2.00 | 2.00 |") in text
    assert text.endswith("<!-- /cards -->\nafter\n")
    for again in (target, tree / "sent.json"):
        collect.collect(again)
        assert (tree / "bench" / "README.md").read_text() == text
    collect.collect(write(tree, json.loads(json.dumps(good()).replace("Tesla T4", "NVIDIA H200"))))
    both = (tree / "bench" / "README.md").read_text()
    assert both.index("**NVIDIA H200**") < both.index("**Tesla T4**")


def test_nothing_measured(tree):
    render.main()
    assert "No card has been measured yet." in (tree / "bench" / "README.md").read_text()


def test_an_older_file_does_not_replace_a_newer_one(tree):
    collect.collect(write(tree, good()))
    with pytest.raises(SystemExit, match="date must not be before that of card-tesla-t4.json"):
        collect.collect(write(tree, good() | {"date": "2025-11-23T22:59:59+02:00"}))


def without(name: str) -> dict:
    return {k: v for k, v in MACHINE.items() if k != name}


def job(i: int, **change) -> dict:
    data = good()
    data["jobs"][i] |= change
    return data


@pytest.mark.parametrize(("data", "message"), [
    ("{", "Expecting property name"),
    ("[" * 100_000, "recursion|Recursion|nested|Expecting"),
    ([], r"the file must be a JSON object, got \[\]"),
    (good() | {"format": 2}, "format must be 1, got 2"),
    (good() | {"name": 3}, "name must be a str, got 3"),
    (good() | {"name": "T4 | <b>", "machine": MACHINE | {"gpu": "T4 | <b>"}}, "machine.gpu must be a plain text"),
    (good() | {"name": "Tesla T5"}, "machine.gpu must be the file's name, Tesla T5, got 'Tesla T4'"),
    (good() | {"name": "---", "machine": MACHINE | {"gpu": "---"}}, "name must be a text with letters or digits, got '---'"),
    (good() | {"name": "../../etc"} | {"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    (good() | {"device": "cpu"}, "machine must be without gpu and cuda where device is cpu, got {"),
    (good() | {"date": "yesterday"}, "date must be an ISO date with its time zone, got 'yesterday'"),
    (good() | {"date": "2025-11-23"}, "date must be an ISO date with its time zone, got '2025-11-23'"),
    (good() | {"date": "9999-11-23T21:00:00+00:00"}, "date must be not after now"),
    (good() | {"seconds": True}, "seconds must be a number > 1e-9 and < 1e9, got True"),
    (good() | {"seconds": -1}, "seconds must be a number > 1e-9 and < 1e9, got -1"),
    (good() | {"budget": 10 ** 400}, "budget must be a number > 1e-9 and < 1e9, got 1000"),
    (good() | {"seconds": float("nan")}, "seconds must be a finite number, got nan"),
    (good() | {"machine": without("torch")}, "machine.torch must be a text, got None"),
    (good() | {"machine": MACHINE | {"triton": 3}}, "machine.triton must be a text, got 3"),
    (good() | {"machine": without("threads")}, "machine.threads must be a number > 1e-9 and < 1e9, got None"),
    (good() | {"jobs": []}, "jobs must be a list with at least one job"),
    (good() | {"jobs": [3]}, r"jobs\[0\] must be an object, got 3"),
    (job(1, name="other"), r"jobs\[1\].name must be one of .*, add_norm, .*, got 'other'"),
    (job(1, kind="model"), r"jobs\[1\].kind must be operator, got 'model'"),
    (job(1, seconds=-1.0), r"jobs\[1\].seconds must be a number >= 0, got -1.0"),
    (job(1, cut=3), r"jobs\[1\].cut must be null or a text, got 3"),
    (job(1, clocks={"sm_mhz": 3}), r"jobs\[1\].clocks.sm_mhz must be \[least, median, most\] in 0..1e5, got 3"),
    (job(1, clocks={"sm_mhz": [3, 2, 1]}), r"jobs\[1\].clocks.sm_mhz must be \[least, median, most\] in 0..1e5, got \[3, 2, 1\]"),
    (job(1, rows=[{"dtype": "float16"}]), r"jobs\[1\].rows\[0\].ms must be a dict, got None"),
    (job(1, rows=[operator("float16", eager=float("inf"))]), r"jobs\[1\].rows\[0\].ms.eager must be a finite number, got inf"),
    (job(1, rows=[operator("float16", eager=0)]), r"jobs\[1\].rows\[0\].ms.eager must be a number > 1e-9 and < 1e9, got 0"),
    (job(1, rows=[operator("float16", eager=1.0) | {"spread_ms": {"eager": [2, 3]}}]), r"spread_ms.eager must be \[least, most\] around"),
    (job(1, rows=[operator("float16", **{"<script>": 1.0})]), r"jobs\[1\].rows\[0\].ms must be a plain text, got '<script>'"),
    (job(1, rows=[operator("float16", eager=1.0) | {"gpu_ms": {"eager": -1}}]), r"rows\[0\].gpu_ms must be numbers > 0 for names in ms"),
    (job(0, rows=[{k: v for k, v in model().items() if k != "machine"}]), r"jobs\[0\].rows\[0\].machine must be a dict"),
    (job(0, rows=[model() | {"rows": []}]), r"jobs\[0\].rows\[0\].rows must be a list with at least one row"),
    (job(0, rows=[model(dense_ms="4")]), r"jobs\[0\].rows\[0\].rows\[0\].dense_ms must be a number > 1e-9 and < 1e9, got '4'"),
    (job(0, rows=[model(dense_ms=-1.0)]), r"jobs\[0\].rows\[0\].rows\[0\].dense_ms must be a number > 1e-9 and < 1e9, got -1.0"),
    (job(0, rows=[model(pruned_ms=0)]), r"jobs\[0\].rows\[0\].rows\[0\].pruned_ms must be a number > 1e-9 and < 1e9, got 0"),
    (job(0, rows=[model() | {"tokens": 7}]), r"jobs\[0\].rows\[0\].tokens must be null or in 0..1, got 7"),
    (job(0, rows=[model() | {"machine": MACHINE | {"gpu": "<b>"}}]), r"jobs\[0\].rows\[0\].machine.gpu must be a plain text"),
    (job(2, rows=[shared(share={"<b>x</b>": 0.5})]), r"jobs\[2\].rows\[0\].share must be in 0..1 for names in ms, got {'<b>x</b>': 0.5}"),
    (job(2, rows=[shared(share={"add_norm": 1.5})]), r"jobs\[2\].rows\[0\].share must be in 0..1 for names in ms, got {'add_norm': 1.5}"),
    (job(2, rows=[shared(ms={})]), r"jobs\[2\].rows\[0\].ms must be with that of all, got {}"),
    (job(0, rows=[model(fastest=False)]), r"jobs\[0\].rows\[0\].rows must be one fastest of float16, batch 1, .* got \[\]"),
    (job(0, rows=[model() | {"rows": [model(baseline="eager", fastest=True)["rows"][0],
                                      model(baseline="compiled", fastest=False, dense_ms=3.0, speedup=1.5)["rows"][0]]}]),
     r"must be one fastest of float16, batch 1, that with the least dense_ms, got \[4.0\]"),
    (job(0, rows=[model(speedup=50.0, realised_gain=31.25)]), r"jobs\[0\].rows\[0\].rows\[0\].speedup must be about 2, got 50.0"),
    (job(0, rows=[model(realised_gain=900.0)]), r"jobs\[0\].rows\[0\].rows\[0\].realised_gain must be about 1.25, got 900.0"),
    (job(0, rows=[model(dtype="fp3")]), r"jobs\[0\].rows\[0\].rows\[0\].dtype must be one of float32, .* got 'fp3'"),
    (job(1, rows=[operator("fp3", eager=1.0)]), r"jobs\[1\].rows\[0\].dtype must be one of float32, .* got 'fp3'"),
    (job(1, rows=[operator("float16", **{" ": 1.0})]), r"jobs\[1\].rows\[0\].ms must be a plain text, got ' '"),
    (job(1, rows=[operator("float16", eager=5e-324)]), r"jobs\[1\].rows\[0\].ms.eager must be a number > 1e-9 and < 1e9, got 5e-324"),
    (job(1, clocks={"sm_mhz": [0, 1, 1e300]}), r"clocks.sm_mhz must be \[least, median, most\] in 0..1e5, got \[0, 1, 1e\+300\]"),
    (good() | {"jobs": 2 * good()["jobs"][:1]}, r"jobs must be each once, got \['deit_small_patch16_224', 'deit_small_patch16_224'\]"),
])
def test_bad_files_are_refused_naming_the_field(tree, data, message):
    before = (tree / "bench" / "README.md").read_text()
    with pytest.raises(SystemExit, match=message) as refused:
        collect.collect(write(tree, data))
    assert "\n" not in str(refused.value)
    assert not list(render.RESULTS.iterdir())
    assert (tree / "bench" / "README.md").read_text() == before


def test_missing_file(tree):
    with pytest.raises(SystemExit, match="No such file"):
        collect.collect(tree / "nothing.json")


def test_a_job_that_is_cut_keeps_its_rows():
    code = 'import time; print("{\\"a\\": 1}", flush=True); print("{\\"b", end="", flush=True); time.sleep(60)'
    done = card.run("add_norm", [sys.executable, "-c", code], 2.0, lambda: {"sm_mhz": 5.0})
    assert (done["rows"], done["cut"], done["error"], done["kind"]) == ([{"a": 1}], "stopped after 2 s", None, "operator")
    assert done["seconds"] < 20


def test_a_job_that_fails_says_why():
    done = card.run("add_norm", [sys.executable, "-c", "raise OSError('no card')"], 30.0)
    assert (done["rows"], done["cut"], done["error"]) == ([], None, "OSError: no card")
    fault = "raise __import__('torch').AcceleratorError('CUDA error: misaligned address\\nSearch for it.\\nCompile with `DSA`.\\n')"
    assert card.run("add_norm", [sys.executable, "-c", fault], 60.0)["error"] == "torch.AcceleratorError: CUDA error: misaligned address"
    assert card.run("add_norm", [sys.executable, "-c", "raise SystemExit(3)"], 30.0)["error"] == "status 3"


def test_a_real_file_is_accepted(tree):
    """On this machine's CPU, one operator."""
    path = card.card("cpu", 40.0, ["select_tokens"], tree / "card.json")
    data = collect.check(json.loads(path.read_text()))
    assert data["jobs"][0]["name"] == "select_tokens"
    assert data["jobs"][0]["error"] is None
    collect.collect(path)
    assert "`select_tokens` | float32" in (tree / "bench" / "README.md").read_text()


def test_a_machine_without_triton_is_accepted():
    collect.check(good() | {"machine": without("triton")})


def test_committed_results_are_what_the_readmes_show(tmp_path, monkeypatch):
    for path in render.RESULTS.glob("card-*.json"):
        collect.check(json.loads(path.read_text()))
    shown, root = {name: (render.ROOT / name).read_text() for name in ("README.md", "bench/README.md")}, render.ROOT
    monkeypatch.setattr(render, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "kernels").symlink_to(root / "kernels")
    for name, text in shown.items():
        (tmp_path / name).write_text(text)
    render.main()
    assert {name: (tmp_path / name).read_text() for name in shown} == shown


def test_targets_of_a_card_that_was_cut_are_left_out(tmp_path):
    for name in ("kernels_nvidia_h200.json", "card-nvidia-h200.json"):
        (tmp_path / name).write_bytes((render.RESULTS / name).read_bytes())
    whole = targets.table(tmp_path).splitlines()
    for operator, reached, missed in (("policy_attention", 3, 0), ("short_attention", 2, 3), ("select_tokens", 0, 2), ("sliced_mlp", 1, 1),
                                      ("add_norm", 2, 2)):
        lines = [line for line in whole if line.startswith(f"| `{operator}`")]
        assert (sum("| reached |" in line for line in lines), sum("| missed |" in line for line in lines)) == (reached, missed)
    data = json.loads((tmp_path / "card-nvidia-h200.json").read_text())
    for job in data["jobs"]:
        job["rows"] = job["rows"][:1]
    (tmp_path / "card-nvidia-h200.json").write_text(json.dumps(data))
    assert len(targets.table(tmp_path).splitlines()) == len(whole) - 3 - 2 - 4  # attention under a policy, selection, norms
    (tmp_path / "card-nvidia-h200.json").unlink()
    assert [line for line in whole if "short_attention" in line or "sliced" in line] == targets.table(tmp_path).splitlines()[2:]


def test_a_target_is_of_whichever_kernel_is_faster(tmp_path):
    """Selection and norm in one kernel, where it has been timed, or in two."""
    row = {"B": 1, "C": 384, "gpu_ms": {"triton": 0.006, "cuda and norm": 0.009, "norm alone": 0.005, "reference": 0.06,
                                        "argsort, gather": 0.024}}
    (tmp_path / "card-nvidia-h200.json").write_text(json.dumps({"jobs": [{"name": "select_norm", "rows": [row]}]}))
    lines = [[cell.strip() for cell in line.split("|")[3:6]] for line in targets.table(tmp_path).splitlines()[2:]]
    assert lines == [["1.20", "reached", ""], ["10.0, 4.0", "missed", "not profiled"]]


def test_gains_are_of_the_newest_file_and_the_fastest_engines(tree):
    """Each side's fastest, whichever row has it; an older file of that machine does not show."""
    collect.collect(write(tree, good()))
    assert "| deit_small | tokens 0.7 | float16 | 1.60 | **2.00** (4 to 2 ms) |" in (tree / "README.md").read_text()
    row = {"dtype": "float16", "batch": 1}
    later = {"date": "2999-01-01T00:00:00+09:00", "machine": good()["machine"], "models": [
        {"model": "deit_small_patch16_224", "tokens": 0.7, "heads": None, "hidden": 0.5, "flops_ratio": 2.5, "rows": [
            row | {"dense_ms": 3.0, "pruned_ms": 2.0}, row | {"dense_ms": 110.4, "pruned_ms": 1.5}, row | {"batch": 8, "dense_ms": 150.4,
                                                                                                   "pruned_ms": 120.2}]}]}
    (render.RESULTS / "models_later.json").write_text(json.dumps(later))
    earlier = later | {"date": "2998-12-31T12:00:00-01:00", "models": [later["models"][0] | {"hidden": 0.25}]}  # by two hours
    (render.RESULTS / "models_sorts_last.json").write_text(json.dumps(earlier))
    render.main()
    lines = (tree / "README.md").read_text().splitlines()
    assert lines[1].startswith("Tesla T4, 2 threads, torch 2.15.0+cu132")
    assert lines[3:-1] == ["| model | pruned | dtype | MAC ratio | batch 1 | batch 8 |", "|-|-|-|-|-|-|",
                           "| deit_small | tokens 0.7, hidden 0.5 | float16 | 2.50 | **2.00** (3 to 1.5 ms) | **1.25** (150 to 120 ms) |"]


def test_gains_of_a_file_that_was_cut_replace_no_whole_one(tree):
    collect.collect(write(tree, good()))
    cut = good() | {"date": "2999-01-01T00:00:00+00:00"}
    for job in cut["jobs"]:
        if job["kind"] == "model":
            job["cut"] = "stopped after 71 s"
            for model in job["rows"]:
                model["rows"] = [row | {"dense_ms": 1.0} for row in model["rows"]]
    (render.RESULTS / "card-cut.json").write_text(json.dumps(cut))
    render.main()
    assert "**2.00** (4 to 2 ms)" in (tree / "README.md").read_text()


def test_choices_in_few_words():
    """By dtype and size only where they differ."""
    def choice(op, dtype, backend, **facts):
        return {"op": op, "dtype": dtype, "facts": facts, "backend": backend}
    halves, both = ("float16", "bfloat16"), (True, False)
    data = {"card": "Tesla T4", "choices": [
        *(choice("a", kind, "cuda", large=large) for kind in ("float16", "float32") for large in both),
        *(choice("a", kind, "triton" if large else "cuda", large=large, graph=True) for kind in ("float16", "float32") for large in both),
        *(choice("b", kind, "triton" if kind in halves else "cuda", grad=True, packed=True) for kind in (*halves, "float32"))]}
    assert render.choices(data).splitlines()[2:] == ["| `a` | cuda | – | small cuda, large triton | – |",
                                                     "| `b, packed` | – | 16 bits: triton; float32: cuda | – | – |"]
