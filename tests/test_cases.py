"""Inputs of every operator, and what is alive in them."""
import pytest
import torch

from vitprune import cases, tune
from vitprune.cases import Size
from vitprune.ops import registry

CPU = torch.device("cpu")


def test_every_operator_has_inputs():
    assert {case.split()[0] for case in cases.CASES} == set(registry.TABLES)
    for case in cases.CASES:
        trial = tune.Trial(tune.Item(case, "float32", Size(2, 1, 0.5, tokens=9), False), CPU)
        assert "reference" in trial.usable
        assert trial.fails("reference") is None


@pytest.mark.parametrize("what, each", [("heads", 1), ("hidden", 4)])
def test_blocks_are_those_that_the_trainer_left(what, each):
    """At the widths and shares of DeiT; one of many is not evenly spread. Elsewhere as many up to the last."""
    found = {}
    for H in cases.HEADS.values():
        for share in cases.KEEPS:
            ids = found[H, share] = cases.live(64 * H, share, what).tolist()
            assert ids == sorted({*ids}) and 0 <= ids[0] and ids[-1] < each * H and len(ids) <= each * H * (1 if share == 1 else 0.99)
            assert abs(len(ids) - each * H * share) <= 1
    assert found[12, 0.5] not in (list(range(each * 6)), list(range(0, each * 12, 2)))
    assert cases.live(64, 0.3, "hidden").tolist() == [3] and cases.live(128, 1.0, "heads").tolist() == [0, 1]
