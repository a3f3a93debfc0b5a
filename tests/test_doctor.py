"""The doctor's judgement, on faked machines."""
import json
import subprocess
import sys

import pytest
import torch

from vitprune import doctor
from vitprune.doctor import GPU, Machine
from vitprune.ops import registry

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def machine(gpu=None, build="13.0", archs=CU130, driver_cuda=(13, 0), usable=True):
    cards = (gpu,) if gpu else ()
    return Machine("2.15.0", build, archs, cards if usable else (), "580.65.06" if gpu else None, driver_cuda, cards)


@pytest.mark.parametrize("gpu", [GPU("GeForce RTX 2080 Ti", (7, 5)), GPU("GeForce RTX 4090", (8, 9)), GPU("H200", (9, 0)),
                                 GPU("GeForce RTX 5090", (12, 0)), GPU("Future", (13, 0)), None])
def test_usable(gpu):
    assert doctor.problems(machine(gpu)) == []


def test_pascal_runs_on_the_cuda_12_6_build_only():
    pascal = GPU("GeForce GTX 1080 Ti", (6, 1))
    assert doctor.problems(machine(pascal, "12.6", CU126)) == []
    problem, = doctor.problems(machine(pascal))
    assert "no code for GeForce GTX 1080 Ti (compute capability 6.1)" in problem
    assert "torch<2.15" in problem
    assert "CUDA 12.6" in problem
    with pytest.warns(UserWarning, match="running on the CPU: torch 2.15.0 has no code for GeForce GTX 1080 Ti"):
        assert doctor.default_device(machine(pascal)) == "cpu"
    assert doctor.default_device(machine(pascal, "12.6", CU126)) == "cuda"
    assert doctor.default_device(machine(None)) == "cpu"


def test_card_newer_than_torch():
    problem, = doctor.problems(machine(GPU("GeForce RTX 5090", (12, 0)), "12.6", CU126))
    assert "install a newer torch" in problem


def test_machine_code_for_one_card_alone_serves_no_other():
    assert len(doctor.problems(machine(GPU("Other", (9, 3)), archs=("sm_90a",)))) == 1
    assert doctor.problems(machine(GPU("H200", (9, 0)), archs=("sm_90a",))) == []
    orin = GPU("Orin", (8, 7))
    assert len(doctor.problems(machine(orin, archs=("sm_80", "sm_86")))) == 1
    assert doctor.problems(machine(orin, archs=("sm_80", "sm_87"))) == []


def test_driver_too_old():
    problem, = doctor.problems(machine(GPU("GeForce RTX 4090", (8, 9)), driver_cuda=(12, 4), usable=False))
    assert "supports CUDA 12.4, and torch 2.15.0 needs CUDA 13.0: update the NVIDIA driver" in problem
    assert doctor.problems(machine(GPU("GeForce RTX 4090", (8, 9)), "12.6", CU126, (12, 4))) == []


def test_cpu_build_beside_a_card():
    problem, = doctor.problems(machine(GPU("H200", (9, 0)), None, (), usable=False))
    assert "built without CUDA and cannot use H200" in problem


def test_report_lists_every_backend_with_its_reason():
    facts = json.loads(json.dumps(doctor.report(machine(GPU("GeForce GTX 1080 Ti", (6, 1))))))
    assert facts["problems"]
    table = facts["backends"]["cpu"]
    assert set(table) == set(registry.TABLES)
    assert table["select_tokens"]["reference"] is None
    assert table["select_tokens"]["cuda"] == "runs on an NVIDIA GPU, not on cpu"
    printed = doctor.text(facts)
    assert "not cuda: runs on an NVIDIA GPU, not on cpu" in printed
    assert "GeForce GTX 1080 Ti (compute capability 6.1)" in printed
    assert "torch<2.15" in printed


def test_package_under_another_name(tmp_path, monkeypatch):
    """onnxruntime-gpu brings the module onnxruntime; a folder in the way is no package."""
    info = tmp_path / "other_openvino-1.2.dist-info"
    for folder in (info, tmp_path / "openvino", tmp_path / "onnxruntime"):
        folder.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-openvino\nVersion: 1.2\n")
    (info / "top_level.txt").write_text("openvino\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("openvino", "onnxruntime"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert [doctor._version(name) for name in ("openvino", "onnxruntime", "timm")] == ["1.2", None, None]


def test_json_is_one_document(tmp_path):
    code = "from vitprune import doctor; doctor.main(json=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout)["machine"]["torch_version"] == torch.__version__


def test_nvcc_is_looked_for_where_the_build_looks(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert doctor.report()["compilers"]["nvcc"] == str(nvcc)
