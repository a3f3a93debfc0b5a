"""What an install consists of, with and without compilers. The long tests build in isolation and need a package index."""
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = {"vitprune/__init__.py", "vitprune/ops/select_tokens.py", "vitprune/kernels/select_tokens.py",
          "vitprune/csrc/params.h", "vitprune/csrc/cuda/select_tokens.cu"}
NO_COMPILER = {"CXX": "/bin/false"}


def run(*command, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("VITPRUNE_REQUIRE_NATIVE", "PYTHONPATH", "CUDA_HOME")}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=clean | environment)


def wheel(folder: Path, source: Path = ROOT, **environment) -> set[str] | None:
    """Names of the files of the wheel that `pip wheel` builds in isolation, or None where it fails."""
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, source, **environment)
    built = list(folder.glob("vitprune-*.whl"))
    assert (done.returncode == 0) == bool(built), done.stderr
    return set(zipfile.ZipFile(built[0]).namelist()) if built else None


def fake_cuda_home(folder: Path, script: str) -> dict[str, str]:
    nvcc = folder / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(folder / "cuda")}


def has(names: set[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in names)


def test_uninstalled_checkout_says_so(tmp_path):
    shutil.copytree(ROOT / "vitprune", tmp_path / "vitprune")
    done = run(sys.executable, "-S", "-c", "import vitprune", cwd=tmp_path)
    assert "is a checkout that is not installed: run `pip install -e .`" in done.stderr


@pytest.mark.long
class TestBuild:
    def test_compiler_only(self, tmp_path):
        names = wheel(tmp_path, **fake_cuda_home(tmp_path, "exit 1"))
        assert names >= NEEDED
        assert has(names, ".so")
        assert not has(names, ".cubin")

    def test_nvcc_that_fails_costs_the_cubins_only(self, tmp_path):
        names = wheel(tmp_path, **fake_cuda_home(tmp_path, '[ "$1" = --list-gpu-code ] && echo sm_80'))
        assert has(names, ".so")
        assert not has(names, ".cubin")

    @pytest.mark.parametrize("script", ["exit 1", '[ "$1" = --list-gpu-code ] && echo sm_80'])
    def test_required_cuda_fails_without(self, tmp_path, script):
        assert wheel(tmp_path, VITPRUNE_REQUIRE_NATIVE="cuda", **fake_cuda_home(tmp_path, script)) is None

    @pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="no nvcc")
    def test_nvcc(self, tmp_path):
        names = wheel(tmp_path, VITPRUNE_REQUIRE_NATIVE="cuda", VITPRUNE_CUDA_ARCHS="80;90")
        assert {n for n in names if n.endswith(".cubin")} == {f"vitprune/cubins/select_tokens.sm{a}.cubin" for a in (80, 90)}

    def test_no_compiler(self, tmp_path):
        names = wheel(tmp_path, **NO_COMPILER)
        assert names >= NEEDED
        assert not has(names, ".so")

    def test_required_cpu_fails_without_compiler(self, tmp_path):
        assert wheel(tmp_path, VITPRUNE_REQUIRE_NATIVE="cpu", **NO_COMPILER) is None

    def test_sdist_then_wheel(self, tmp_path):
        environment = tmp_path / "env"
        venv.create(environment, with_pip=True)
        python = environment / "bin/python"
        run(python, "-m", "pip", "install", "build").check_returncode()
        run(python, "-m", "build", "--sdist", "-o", tmp_path, ROOT).check_returncode()
        sdist, = tmp_path.glob("vitprune-*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        assert names >= {"pyproject.toml", "CMakeLists.txt", "LICENSE", "kernels/select_tokens.py",
                         "csrc/bind.cpp", "csrc/cpu/select_tokens.cpp", "csrc/cuda/select_tokens.cu"}
        names = wheel(tmp_path / "wheel", sdist)
        assert names >= NEEDED
        assert has(names, ".so")

    @pytest.mark.parametrize("environment", [{}, NO_COMPILER], ids=["compiler", "no compiler"])
    def test_editable(self, tmp_path, environment):
        """Installed without dependencies, over this interpreter's own packages."""
        venv.create(tmp_path / "env", with_pip=True)
        python = tmp_path / "env/bin/python"
        site, = (tmp_path / "env").glob("lib/python*/site-packages")
        (site / "zz_borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
        done = run(python, "-m", "pip", "install", "--no-deps", "--ignore-installed", "-e", ROOT, **environment)
        assert done.returncode == 0, done.stderr
        code = ("import torch, vitprune; from vitprune import native, kernels; from vitprune.ops import select_tokens;"
                "print(vitprune.__file__, native.reason_cpp(torch.device('cpu')) is None,"
                "select_tokens(torch.ones(1, 4, 2), torch.tensor([[1., 3., 2.]]), 2)[1].tolist())")
        done = run(python, "-c", code, cwd=tmp_path)
        assert done.stdout.strip() == f"{ROOT}/vitprune/__init__.py {not environment} [[1, 2]]", done.stderr
