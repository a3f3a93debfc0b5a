"""Choosing by measurement, on faked operators: what is measured, checked, written, read and ignored."""
import json
import math
import shutil
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import CPP, INTERPRETED
from vitprune.kernels import configs

from vitprune import cases, doctor, tune
from vitprune.cases import Size
from vitprune.cli import main
from vitprune.ops import dispatch, registry
from vitprune.ops.registry import Backend

CPU, OP = torch.device("cpu"), "toy"
FAST = {"stages": 1, "programs": 1}
TOY = SimpleNamespace(default=lambda dtype, arch, R: FAST | {"stages": 2},  # stages: its milliseconds; programs: what it multiplies by
                      candidates=lambda dtype, arch, R: [FAST | change for change in ({"stages": 2}, {"programs": 2}, {"stages": 9}, {})])


def slow(x):
    time.sleep(0.002)
    return x * 2


def failing(x):
    raise OSError("no such card\nand more")


def toy(x):
    return registry.call(OP, registry.choose(OP, x.device, x.dtype, large=registry.large(x.shape[0])), x)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with one operator, the card "Card A" and an empty cache; returns what replaces the operator's table."""
    def have(*backends):
        monkeypatch.setattr(registry, "TABLES", {OP: {b.name: b for b in backends}})
        registry.reload()
    monkeypatch.setenv("VITPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(cases, "CASES", {OP: lambda size, make: (toy, [make.normal(size.B * 200, 3)])})
    monkeypatch.setattr(dispatch, "card", lambda device: "Card A")
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(configs, "_said", set())
    monkeypatch.setattr(configs, "kernel", lambda op: TOY)
    monkeypatch.setattr(tune, "interpreted", lambda device: False)
    have(Backend("reference", slow, composite=True), Backend("fast", lambda x: x + x, composite=True),
         Backend("wrong", lambda x: x * 2.01, composite=True), Backend("broken", failing, composite=True),
         Backend("nan", lambda x: x * 2 * math.nan, composite=True),
         Backend("absent", failing, composite=True, refuses=lambda *_, **__: "not here"))
    yield have
    monkeypatch.undo()
    registry.reload()


def quickly(**options):
    return tune.tune("cpu", quick=True, min_time=0.0, **options)


def chosen(**facts):
    with torch.inference_mode():
        return registry.choose(OP, CPU, torch.float32, **facts)


def test_the_fastest_is_written_and_chosen(machine, tmp_path):
    assert chosen(large=True) == "reference"
    result = quickly()
    assert result["file"] == str(dispatch.path_of("Card A"))
    assert dispatch.path_of("Card A").parent == tmp_path / "dispatch" / dispatch.versions()["vitprune"]
    assert json.loads(open(result["file"]).read())["versions"] == dispatch.versions()
    assert not list(tmp_path.rglob("tmp*"))
    assert {(c["dtype"], c["facts"]["large"], c["facts"]["grad"]) for c in result["choices"]} == {
        (kind, large, grad) for kind in ("float32", "bfloat16") for large in (False, True) for grad in (False, True)}
    assert {c["backend"] for c in result["choices"]} == {"fast"}
    assert chosen(large=True) == chosen(large=False) == "fast"
    assert registry.choose(OP, CPU, torch.float32, large=True) == "fast"  # with gradient
    assert chosen(large=True, unheard=1) == "reference"  # a case that was not measured
    assert registry.choose(OP, CPU, torch.float16, large=True) == "reference"
    with registry.backend("reference"):
        assert chosen(large=True) == "reference"


def test_what_fails_its_check_is_disabled_and_says_so(machine):
    result = quickly()
    reasons = {d["backend"]: d["reason"] for d in result["disabled"] if d["dtype"] == "float32"}
    assert set(reasons) == {"wrong", "broken", "nan"}
    assert reasons["broken"] == "OSError: no such card"
    assert "result 0 is off by" in reasons["wrong"]
    assert "batch 1, 197 tokens" in reasons["wrong"]
    table = registry.table(OP, CPU)
    assert table["wrong"].startswith("failed its check on this card: result 0")
    assert (table["fast"], table["absent"]) == (None, "not here")
    with registry.backend("wrong"), pytest.warns(UserWarning, match="toy: backend 'wrong' failed its check on this card"):
        assert float(toy(torch.ones(1, 3))[0, 0]) > 2
    with registry.backend("absent"), pytest.raises(RuntimeError, match="cannot run here: not here"):
        toy(torch.ones(1, 3))
    printed = doctor.text(json.loads(json.dumps(doctor.report())))
    assert "not wrong: failed its check on this card" in printed
    assert "not wrong for bfloat16: failed its check" in printed
    assert "measured: fast for float32, float32 grad" in printed


def test_a_disabled_backend_is_not_chosen_although_it_comes_first(machine):
    machine(Backend("wrong", lambda x: x * 3, composite=True), Backend("reference", slow, composite=True))
    assert chosen(large=False) == "wrong"
    assert {d["backend"] for d in quickly()["disabled"]} == {"wrong"}
    assert chosen(large=False) == "reference"


def test_graphs_take_the_choice(machine, monkeypatch):
    quickly()
    f = torch.compile(toy, fullgraph=True, backend="eager")
    with registry.watch() as asked:
        for rows in (2, 3, 5000):
            torch.testing.assert_close(f(torch.ones(rows, 3)), torch.full((rows, 3), 2.0))
    assert [facts["large"] for *_, facts in asked] == [False, False, True]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert (registry.large(5000), chosen(large=False)) == (False, "reference")  # plain PyTorch, wherever it will run


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda data: "{", "Expecting property name"),
    (lambda data: "[" * 100_000, "it is nested too deeply|Expecting"),
    (lambda data: "[]", "it must hold a JSON object"),
    (lambda data: json.dumps(data | {"choices": 3}), "choices must be a list, got 3"),
    (lambda data: json.dumps({k: v for k, v in data.items() if k != "versions"}), "versions must be a dict, got None"),
    (lambda data: json.dumps(data | {"disabled": [{"op": OP}]}), "disabled must hold objects with dtype"),
    (lambda data: json.dumps(data | {"configs": {OP: {"float32": [{"shape": {"B": "x"}, "config": {}}]}}}), "configs of toy must be"),
    (lambda data: json.dumps(data | {"card": "Card B"}), "card must be Card A, got Card B"),
])
def test_a_corrupt_file_is_ignored_with_a_warning(machine, spoil, message):
    path = dispatch.path_of("Card A")
    assert quickly()["file"] == str(path)
    path.write_text(spoil(json.loads(path.read_text())))
    registry.reload()
    with pytest.warns(UserWarning, match=f"is ignored: {message}"):
        assert chosen(large=True) == "reference"
    assert chosen(large=False) == "reference"
    assert quickly()["choices"]
    assert chosen(large=False) == "fast"


def test_what_is_not_measured_again_is_kept(machine):
    data = json.loads(open(quickly()["file"]).read())
    wrong = next(row for row in data["disabled"] if row["backend"] == "wrong")
    configs = {"float32": [{"shape": {"R": 200}, "config": FAST}]}
    earlier = {"choices": [row | {"op": "other"} for row in data["choices"]] + [data["choices"][0] | {"facts": {"large": "unheard"}}],
               "disabled": [wrong | {"op": "other"}, wrong | {"dtype": "float64"}],
               "measured": [row | {"op": "other"} for row in data["measured"]], "configs": {"other": configs, OP: configs}}
    path = dispatch.path_of("Card A")
    path.write_text(json.dumps(data | {k: v if k == "configs" else data[k] + v for k, v in earlier.items()}))
    result = quickly()
    cases = lambda rows: [(row["op"], row["dtype"], row["facts"]) for row in rows]  # noqa: E731
    assert cases(result["choices"]) == cases(data["choices"] + earlier["choices"])
    assert cases(result["measured"]) == cases(data["measured"] + earlier["measured"])
    assert result["disabled"] == data["disabled"] + earlier["disabled"]
    assert result["configs"] == earlier["configs"]
    assert json.loads(path.read_text()) == {k: v for k, v in result.items() if k not in ("file", "kept", "left_out", "seconds")}
    assert result["kept"] == ["other bfloat16", "other float32", "toy float32", "toy float64"]
    assert "kept as tuned before: other bfloat16, other float32, toy float32, toy float64" in tune.text(result)
    assert quickly()["choices"][len(data["choices"]):] == earlier["choices"]


def test_another_cards_file_is_not_used(machine, monkeypatch):
    quickly()
    monkeypatch.setattr(dispatch, "card", lambda device: "Card B")
    registry.reload()
    assert chosen(large=True) == "reference"
    monkeypatch.setattr(dispatch, "card", lambda device: "Card A")
    monkeypatch.setattr(dispatch, "versions", lambda: {"torch": "9.9", "triton": "9.9", "vitprune": "9"})
    registry.reload()
    assert chosen(large=True) == "reference"  # other versions count as another card


def test_what_runs_forward_only_is_kept_for_that(machine):
    machine(Backend("reference", slow, composite=True), Backend(
        "forward", lambda x: x + x, composite=True, refuses=lambda device, dtype, grad=False, **_: "forward only" if grad else None))
    result = quickly()
    assert result["disabled"] == []
    assert {c["backend"] for c in result["choices"] if not c["facts"]["grad"]} == {"forward"}
    assert {c["backend"] for c in result["choices"] if c["facts"]["grad"]} == {"reference"}


def test_what_a_cuda_graph_holds_is_chosen_for_it(machine, monkeypatch):
    """In a graph the host's time does not count: such a choice has a row of its own."""
    rows = [{"op": OP, "dtype": "float32", "facts": {"large": True, "grad": False} | more, "backend": name}
            for more, name in (({}, "reference"), ({"graph": True}, "fast"))]
    monkeypatch.setattr(dispatch, "of", lambda device: dispatch.Dispatch(None, {"choices": rows, "disabled": []}))
    monkeypatch.setattr(registry, "reload", lambda: None)
    assert chosen(large=True) == "reference"
    with registry.for_graph():
        assert chosen(large=True) == "fast"
    assert chosen(large=True) == "reference"


def test_a_shipped_file_serves_until_the_user_tunes(machine, monkeypatch, tmp_path):
    path = dispatch.path_of("Card A")
    quickly()
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "shipped")
    configs.FOLDER.mkdir()
    shipped = configs.FOLDER / "card-a.json"
    shutil.move(path, shipped)
    registry.reload()
    assert chosen(large=True) == "fast"
    assert doctor.measured(CPU)["file"] == str(shipped)
    path.write_text("{")
    registry.reload()
    with pytest.warns(UserWarning, match="is ignored"):
        assert chosen(large=True) == "fast"


def test_a_cache_folder_that_cannot_be_read_costs_what_was_measured_only(machine, monkeypatch):
    read = Path.read_text

    def refuse(path, *args, **kwargs):
        if path == dispatch.path_of("Card A"):
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)
    quickly()
    monkeypatch.setattr(Path, "read_text", refuse)
    registry.reload()
    with pytest.warns(UserWarning, match="is ignored: .*Permission denied"):
        assert chosen(large=True) == "reference"


def test_a_gpu_takes_what_is_shipped_for_its_compute_capability(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "shipped")
    configs.FOLDER.mkdir()
    monkeypatch.setattr(dispatch, "card", lambda device: "Card C")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choice = {"op": OP, "dtype": "float32", "facts": {"large": True, "grad": True}, "backend": "fast"}
    for name, capability in (("Card A", [8, 9]), ("Card B", [9, 0])):
        data = {"card": name, "versions": {}, "choices": [choice], "disabled": [], "configs": {}, "machine": {"capability": capability}}
        (configs.FOLDER / f"{dispatch.slug(name)}.json").write_text(json.dumps(data))
    assert dispatch.of(torch.device("cuda", 0)).path == configs.FOLDER / "card-b.json"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    registry.reload()
    assert dispatch.of(torch.device("cuda", 0)).path is None


def test_the_budget_is_kept_and_what_is_left_is_named(machine):
    result = quickly(budget=1e-9)
    assert (result["choices"], result["file"]) == ([], None)
    assert result["left_out"] == ["toy float32: 2 of 2 steps", "toy bfloat16: 2 of 2 steps"]
    machine(Backend("reference", lambda x: time.sleep(0.02) or x * 2, composite=True), Backend("fast", lambda x: x + x, composite=True))
    start = time.monotonic()
    result = tune.tune("cpu", budget=2.0, min_time=0.0)
    assert time.monotonic() - start < 20
    assert result["choices"]
    assert "toy float32" in result["left_out"][0]
    assert "not tuned: toy float32" in tune.text(result)


def test_a_backend_must_be_clearly_faster_to_come_before_another(machine):
    def state(ms):
        return tune.State(CPU, 0.0, {i: {"op": OP, "dtype": "float32", "facts": {}, "ms": row} for i, row in enumerate(ms)})
    choice, = tune.decide(state([{"reference": 1.0, "fast": 0.99}]))["choices"]
    assert (choice["backend"], choice["speedup"]) == ("reference", 1.0)
    choice, = tune.decide(state([{"reference": 4.0, "fast": 1.0}, {"reference": 1.0, "fast": 1.0}]))["choices"]
    assert (choice["backend"], choice["speedup"]) == ("fast", 2.0)
    choice, = tune.decide(state([{"reference": 4.0, "fast": 1.0}, {"reference": 1.0}]))["choices"]  # not timed at every size
    assert choice["backend"] == "reference"


def test_configurations_are_checked_and_the_fastest_is_used(machine):
    def kernel(x):
        config = configs.nearest(OP, 80, x.dtype, (("R", x.shape[0]),)) or FAST | {"stages": 2}
        if config["stages"] > 5:
            raise RuntimeError("out of shared memory")
        time.sleep(config["stages"] * 1e-3)
        return x * (1 + config["programs"])
    machine(Backend("reference", slow, composite=True), Backend("triton", kernel, composite=True))
    trial = tune.Trial(tune.Item(OP, "float32", Size(1, 1), True), CPU)
    found = tune.configure(trial, tune.State(CPU, time.monotonic() + 60), 0.0, lambda: None)
    assert found == {(OP, 80, torch.float32, (("R", 200),)): FAST}
    path = dispatch.path_of("Card A")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"card": "Card A", "versions": {}, "choices": [], "disabled": [], "configs": tune._table(found)}))
    registry.reload()
    assert chosen(large=True) == "reference"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert configs.nearest(OP, 80, torch.float32, (("R", 200),)) == FAST
        assert not said
        for rows in (300, 900, 1000):
            assert configs.nearest(OP, 80, torch.float32, (("R", rows),)) == FAST
    assert [str(w.message) for w in said] == ["toy: no launch configuration is tuned for R 900, that of R 200 serves; said once"]
    assert configs.nearest(OP, 80, torch.float16, (("R", 300),)) is None


def test_a_card_that_fails_ends_the_run_and_the_culprit_is_disabled(machine):
    def crash(x):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nand more")
    machine(Backend("reference", slow, composite=True), Backend("crash", crash, composite=True))
    result = quickly()
    assert [d["reason"] for d in result["disabled"]] == ["CUDA error: an illegal memory access was encountered"]
    assert result["left_out"][0].startswith("all that came after toy, where the card failed: CUDA error")
    assert result["left_out"][1:] == ["toy float32: 1 of 2 steps", "toy bfloat16: 2 of 2 steps"]


def test_bad_input():
    with pytest.raises(ValueError, match="budget must be > 0 seconds, got 0"):
        tune.tune("cpu", budget=0)
    with pytest.raises(ValueError, match="operators must be among .*, got 'toy'"):
        tune.tune("cpu", operators=["toy"])


def test_command(machine, capsys):
    assert main(["tune", "--device", "cpu", "--quick", "--budget", "1e-9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] is None
    assert main(["tune", "--device", "cpu", "--budget", "-1"]) == 2
    assert "budget must be > 0 seconds, got -1" in capsys.readouterr().err


@CPP
def test_an_operator_made_of_others_is_timed_with_what_serves_them(monkeypatch):
    """Beside the plain form of its parts any kernel would look fast; its check wants that form."""
    def never(*args):
        raise AssertionError("the plain selection")

    trial = tune.Trial(tune.Item("select_norm", "float32", Size(1, 1, 0.5, tokens=9), False), CPU)
    monkeypatch.setitem(registry.TABLES["select_tokens"], "reference", Backend("reference", never, composite=True))
    trial.call("reference", False)()
    with pytest.raises(AssertionError, match="the plain selection"):
        trial.run("reference", None)
    for op, message in (("select_norm", "name must be one of reference, triton, got 'cpp'"), ("norm", "op must be one of .*, got 'norm'")):
        with pytest.raises(ValueError, match=f"^backend: {message}"), registry.backend("cpp", op):
            pass


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")
@pytest.mark.parametrize("operators", [["expand_rows", "add_norm", "select_tokens"],
                                       pytest.param([*registry.TABLES], marks=pytest.mark.long, id="all")])
def test_real_kernels_interpreted(operators, monkeypatch, tmp_path):
    """Every step on real kernels; nothing is written, since the times mean nothing."""
    monkeypatch.setenv("VITPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "HOPELESS", math.inf)
    result = tune.tune("cpu", budget=300, operators=operators, min_time=0.0)
    assert (result["disabled"], result["file"], result["left_out"], list(tmp_path.iterdir())) == ([], None, [], [])
    assert set(operators) <= set(result["configs"])
    configs.check(result["configs"])
    assert "interpreter is on" in tune.text(result)
