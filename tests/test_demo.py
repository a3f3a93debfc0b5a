"""The demo end to end: one short seed always, three full seeds under the marker `long`."""
import contextlib
import io
import json
import math
import re
import statistics
import sys

import pytest
import torch

from vitprune import demo, report
from vitprune.digits import load_digits

NAMES = ["dense", "tokens", "random tokens", "blocks", "random blocks", "both in tandem", demo.LEARNED, demo.RANDOM]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(result, report) of `vitprune demo --quick --json --epochs 3`: one seed, one epoch for each pruned model."""
    output, stdout = tmp_path_factory.mktemp("demo") / "deep" / "report.html", io.StringIO()
    with contextlib.redirect_stdout(stdout):
        demo.main(demo.DemoConfig(epochs=3, output=str(output), json=True, quick=True))
    return json.loads(stdout.getvalue()), output  # exactly one document


def test_every_model_is_trained_counted_and_evaluated(run):
    rows = run[0]["models"]
    assert [row["name"] for row in rows] == NAMES and len(run[0]["learning"]) == 1
    assert all(row["count"] >= 600 and 0 < row["top1"] <= row["top5"] <= 100 for row in rows)
    assert rows[0]["top1"] > 20  # chance is 10
    macs = {row["name"]: row["macs"] for row in rows}
    assert macs["both in tandem"] < min(macs["tokens"], macs["blocks"]) <= max(macs["tokens"], macs["blocks"]) < macs["dense"]
    head = 17 * 4 * 64 * 16 + 2 * 17 * 17 * 16  # the dearest unit: what a budget may miss
    assert all(abs(macs["dense"] / 2 - macs[name]) < head for name in ("blocks", "random blocks"))
    assert macs["random tokens"] < macs["tokens"] and macs[demo.RANDOM] < macs[demo.LEARNED]  # a control has no predictors


def test_parameters_are_those_of_the_closed_form(run):
    params = {row["name"]: row["params"] for row in run[0]["models"]}
    C, depth = 64, 6
    predictor = 2 * C + (C * C + C) + (C * C // 2 + C // 2) + (C * C // 8 + C // 4) + (C // 2 + 2)
    attention, mlp = 4 * C * C + 4 * C, 8 * C * C + 5 * C
    dense = depth * (attention + mlp + 4 * C) + (4 * C + C) + C + 17 * C + 2 * C + 10 * (C + 1)
    assert params["dense"] == dense and params["tokens"] == dense + 3 * predictor and params[demo.LEARNED] == dense + predictor
    head, hidden = 16 * (4 * C + 3), 16 * (2 * C + 1)  # what leaves with one of each
    for name, extra in (("blocks", 0), ("random blocks", 0), ("both in tandem", 3 * predictor)):
        gone = dense + extra - params[name]
        assert any((gone - heads * head) % hidden == 0 and 0 < gone - heads * head < 16 * depth * hidden for heads in range(3 * depth + 1))
    assert params["random tokens"] == params[demo.RANDOM] == dense


def test_learning_shows_is_the_binomial_error_of_a_difference():
    rows = [{"name": demo.LEARNED, "top1": 90.0, "count": 600}, {"name": demo.RANDOM, "top1": 60.0, "count": 600}]
    shown = demo.learning_shows(rows)
    assert shown["difference"] == 30.0
    assert shown["standard_error"] == pytest.approx(100 * (0.9 * 0.1 / 600 + 0.6 * 0.4 / 600) ** 0.5)


def test_summary_is_mean_and_spread_over_seeds():
    row = {"name": "dense", "params": 1, "macs": 2, "top5": 99.0, "cpu_s": 3.0, "count": 600}
    one, = demo.summarise([[{**row, "top1": 96.0}], [{**row, "top1": 99.0}]])
    assert one["top1"] == 97.5 and one["spread"] == pytest.approx(statistics.stdev([96, 99])) and one["cpu_s"] == 6.0


def test_real_sizes_are_timed(run):
    rows = run[0]["timing"]
    assert [(row["name"], row["batch"]) for row in rows] == [("tokens", 1), ("blocks", 1), ("both", 1)]
    for row in rows:
        assert row["realised_gain"] == pytest.approx(row["speedup"] / row["flops_ratio"], rel=1e-3)
        assert row["flops_ratio"] == pytest.approx(row["dense_macs"] / row["macs"], rel=1e-3)
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["pruned_ms"], rel=1e-3)


def test_report_is_one_self_contained_file(run):
    result, output = run
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    page = output.read_text()
    assert not re.search(r"""<(script|link|iframe)|(src|href)\s*=\s*["']?(?!["']?(data:image/png|#))|url\((?!#)|@import""", page)
    assert page.count("<svg") == 2 and page.count("data:image/png;base64,") == 1
    for row in result["models"]:
        assert f"<td>{row['name']}</td><td>{row['params']:,}</td>" in page


def test_plain_output_is_a_table(capsys):
    row = {"name": "dense", "params": 1234, "macs": 5_000_000, "top1": 98.0, "spread": None}
    timing = {"name": "both", "batch": 8, "dense_ms": 4.0, "pruned_ms": 2.0, "speedup": 2.0, "flops_ratio": 2.5, "realised_gain": 0.8}
    demo.show({"models": [row], "learning": [{"difference": 28.0, "standard_error": 2.0}], "timing": [timing]}, "x.html")
    out = capsys.readouterr().out
    assert re.search(r"dense +1,234 +5.00 +98.00", out) and re.search(r"both +8 +4.00 +2.00 +2.00 +2.50 +0.80", out)


def test_dropped_patches_fade():
    images = torch.zeros(1, 1, 4, 4)
    faded = report.dim_dropped(images, torch.tensor([[0, 3, -1]]), patch=2)[0, 0]
    assert faded[:2, :2].max() == 0 == faded[2:, 2:].max()
    torch.testing.assert_close(faded[:2, 2:], torch.full((2, 2), 0.8))


@pytest.mark.parametrize("package, call", [("matplotlib", report.pyplot), ("sklearn.datasets", load_digits)])
def test_a_missing_package_names_the_extra(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"which is missing: pip install 'vitprune\[demo\]'"):
        call()


@pytest.mark.parametrize("field", ["seeds", "epochs"])
def test_bad_config(field):
    with pytest.raises(ValueError, match=f"DemoConfig: {field} must be >= 1, got 0"):
        demo.DemoConfig(**{field: 0})


@pytest.mark.long
def test_three_seeds_reach_their_targets():
    runs = [demo.experiment(seed, demo.Recipe())[0] for seed in range(3)]
    top1 = {row["name"]: row["top1"] for row in demo.summarise(runs)}
    print(top1)
    assert top1["dense"] >= 97
    assert top1["tokens"] >= top1["dense"] - 1
    assert top1["blocks"] >= top1["dense"] - 2
    assert top1["both in tandem"] >= top1["dense"] - 3
    of = {name: [row["top1"] for rows in runs for row in rows if row["name"] == name] for name in ("blocks", "random blocks")}
    error = math.sqrt(sum(statistics.variance(values) / len(runs) for values in of.values()))
    assert top1["blocks"] - top1["random blocks"] > 2 * error, of
    for rows in runs:
        shown = demo.learning_shows(rows)
        assert shown["difference"] > 2 * shown["standard_error"], shown
