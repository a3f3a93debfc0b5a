"""What an install consists of, with and without compilers. The long tests build in isolation and need a package index."""
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from kernel_checks import CPP

ROOT = Path(__file__).parents[1]
NEEDED = {"vitprune/__init__.py", "vitprune/ops/select_tokens.py", "vitprune/kernels/select_tokens.py",
          "vitprune/csrc/params.h", "vitprune/csrc/cuda/select_tokens.cu"}
NO_COMPILER = {"CXX": "/bin/false"}
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ONE_ARCH = {"VITPRUNE_CUDA_ARCHS": "80"} if NVCC else {}


def run(*command, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("VITPRUNE_REQUIRE_NATIVE", "VITPRUNE_CUDA_ARCHS", "PYTHONPATH", "CUDA_HOME")}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=clean | environment)


def pip_wheel(folder: Path, source: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    """What `pip wheel` prints, which builds in isolation."""
    return run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, source, **environment)


def wheel(folder: Path, source: Path = ROOT, **environment) -> set[str] | None:
    """Names of the files of the wheel that `pip wheel` builds, or None where it fails."""
    done = pip_wheel(folder, source, **environment)
    built = list(folder.glob("vitprune-*.whl"))
    assert (done.returncode == 0) == bool(built), done.stderr
    return set(zipfile.ZipFile(built[0]).namelist()) if built else None


# An nvcc that sees cards of these architectures, or none, and writes empty cubins.
LISTS = '[ "$1" = --list-gpu-code ] && printf "sm_80\\nsm_86\\nsm_90\\n" && exit'
SEES = LISTS + """
case "$*" in *--dryrun*) echo "#$ cicc -D__CUDA_ARCH_LIST__=%s %s" >&2; exit;; esac
while [ "$1" != -o ]; do shift; done; touch "$2"
"""


def cubins(names: set[str]) -> set[str]:
    return {Path(name).name for name in names if name.endswith(".cubin")}


def each_cubin(*archs: int) -> set[str]:
    return {f"{path.stem}.sm{arch}.cubin" for path in (ROOT / "csrc/cuda").glob("*.cu") for arch in archs}


def fake_cuda_home(folder: Path, script: str) -> dict[str, str]:
    nvcc = folder / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(folder / "cuda")}


def borrowing(folder: Path) -> Path:
    """The interpreter of a new environment that borrows this one's packages."""
    venv.create(folder, with_pip=True)
    site, = folder.glob("lib/python*/site-packages")
    (site / "zz_borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return folder / "bin/python"


def has(names: set[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in names)


def report(python: Path, folder: Path, **variables) -> str:
    """Where vitprune is imported from, whether its C++ serves, and what an operator says."""
    code = ("import torch, vitprune; from vitprune import native, kernels; from vitprune.ops import select_tokens;"
            "print(vitprune.__file__, native.reason_cpp(torch.device('cpu')) is None,"
            "select_tokens(torch.ones(1, 4, 2), torch.tensor([[1., 3., 2.]]), 2)[1].tolist())")
    done = run(python, "-c", code, cwd=folder, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_wheel_is_built_installed_and_used(tmp_path):
    names = wheel(tmp_path, VITPRUNE_REQUIRE_NATIVE="cpu", **ONE_ARCH)
    assert names >= NEEDED
    assert has(names, ".so")
    assert cubins(names) == (each_cubin(80) if NVCC else set())
    built, = tmp_path.glob("*.whl")
    python = borrowing(tmp_path / "env")
    run(python, "-m", "pip", "install", "--no-deps", "--ignore-installed", built).check_returncode()
    site, = (tmp_path / "env").glob("lib/python*/site-packages")
    read_only = tmp_path / "cache"
    read_only.touch()  # a file in the place of the folder: not even root can write there
    assert report(python, tmp_path, VITPRUNE_CACHE=str(read_only)) == f"{site}/vitprune/__init__.py True [[1, 2]]"


def test_uninstalled_checkout_says_so(tmp_path):
    shutil.copytree(ROOT / "vitprune", tmp_path / "vitprune")
    done = run(sys.executable, "-S", "-c", "import vitprune", cwd=tmp_path)
    assert "is a checkout that is not installed: run `pip install -e .`" in done.stderr


def interpreter(version: str) -> Path:
    """A Python of that version, or a skip: on the PATH, or one of pyenv's."""
    for path in (shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))):
        if path and run(path, "--version").stdout.startswith(f"Python {version}."):
            return Path(path)
    pytest.skip(f"no Python {version}")


@CPP
@pytest.mark.parametrize("hidden", [False, True])
def test_wheels_are_tested_for_their_extension(hidden):
    """cibuildwheel's command, in which nothing else would tell that the extension does not load."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    python, option, code = shlex.split(tool["cibuildwheel"]["test-command"])
    assert (python, option) == ("python", "-c")
    done = run(sys.executable, "-c", f"import sys; sys.modules['vitprune._native'] = None; {code}" if hidden else code)
    assert (done.returncode != 0) == hidden and ("the C++ extension is not installed" in done.stderr) == hidden, done.stderr


EXERCISE = """
import tempfile, timm, torch, vitprune
from vitprune import native, nvrtc
assert (reason := native.reason_cpp(torch.device("cpu"))) is None, reason
torch.manual_seed(0)
model = timm.create_model("deit_tiny_patch16_224").eval()
pruned = vitprune.prune(model, tokens=vitprune.TokenPruning(0.7, score="cls_attention"), blocks=vitprune.BlockPruning(0.5, 0.5))
images = torch.randn(2, 3, 224, 224)
torch.compile(pruned.train(), fullgraph=True, backend="aot_eager")(images).sum().backward()
small = vitprune.compact(pruned.eval())
with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    vitprune.save(small, folder)
    assert torch.allclose(vitprune.load(folder)(images), pruned(images), atol=1e-4)
for source in (nvrtc.SOURCES / "cuda").glob("*.cu"):
    assert nvrtc.compiled(source.stem, "sm_80")[:4] == b"\x7fELF"
print("nvrtc", nvrtc.version(), "torch", torch.__version__, "timm", timm.__version__)
"""


@pytest.mark.long
@pytest.mark.parametrize("version, packages", [("3.10", ["torch==2.10.*", "timm==1.0.26"]), ("3.13", [])], ids=["floors", "newest"])
def test_versions(tmp_path, version, packages):
    """Whole installations, with another CUDA than nvcc's in torch 2.10; NVRTC compiles with nvcc hidden."""
    run(interpreter(version), "-m", "venv", tmp_path / "env").check_returncode()
    python = tmp_path / "env/bin/python"
    done = run(python, "-m", "pip", "install", ROOT, *packages, VITPRUNE_REQUIRE_NATIVE="cpu", **ONE_ARCH)
    assert done.returncode == 0, done.stderr
    done = run(python, "-c", EXERCISE, cwd=tmp_path, PATH="/usr/bin:/bin", VITPRUNE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    done = run(python, "-m", "vitprune", "flops", "nosuch", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("vitprune: error: model must be"), done.stderr
    shutil.rmtree(tmp_path / "env")  # gigabytes


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

    @pytest.mark.parametrize("plan, asked, archs", [
        (("860", ""), {}, (86,)), (("750", "nvcc warning : Cannot find valid GPU for 'native'"), {}, ()),
        (("750", "nvcc warning : Cannot find valid GPU for 'native'"), {"VITPRUNE_CUDA_ARCHS": "80"}, (80,))])
    def test_cubins_of_an_editable_install(self, tmp_path, plan, asked, archs):
        """It serves this machine alone: without a card there are none but those asked for."""
        python = borrowing(tmp_path / "env")
        run(python, "-m", "pip", "install", "--no-deps", "--ignore-installed", "-e", ROOT, **fake_cuda_home(tmp_path, SEES % plan),
            **asked).check_returncode()
        assert {path.name for path in (tmp_path / "env").rglob("*.cubin")} == each_cubin(*archs)

    @pytest.mark.parametrize("asked", [{"VITPRUNE_REQUIRE_NATIVE": "cuda"}, {"VITPRUNE_CUDA_ARCHS": "80"}], ids=["cuda", "80"])
    @pytest.mark.parametrize("script", ["exit 1", '[ "$1" = --list-gpu-code ] && echo sm_80', "exit 0",
                                        'if [ "$1" = --list-gpu-code ]; then echo sm_80; fi'],
                             ids=["none that runs", "fails", "names nothing", "writes nothing"])
    def test_required_cuda_fails_without(self, tmp_path, script, asked):
        done = pip_wheel(tmp_path, **asked, **fake_cuda_home(tmp_path, script))
        (name, value), = asked.items()
        assert done.returncode != 0 and name in done.stderr and "nvcc" in done.stderr, done.stderr

    @pytest.mark.parametrize("plan, asked, archs", [
        (("860,900", ""), {}, (86, 90)), (("750", "nvcc warning : Cannot find valid GPU for 'native'"), {}, (80, 86, 90)),
        (("860", ""), {"VITPRUNE_CUDA_ARCHS": "all"}, (80, 86, 90)), (("860", ""), {"VITPRUNE_CUDA_ARCHS": "80;90"}, (80, 90)),
        (("860", ""), {"VITPRUNE_CUDA_ARCHS": "off", "VITPRUNE_REQUIRE_NATIVE": "0"}, (86,))])
    def test_architectures(self, tmp_path, plan, asked, archs):
        """Those of the cards present, else all; or what is asked for. What says no asks for nothing."""
        assert cubins(wheel(tmp_path, **fake_cuda_home(tmp_path, SEES % plan), **asked)) == each_cubin(*archs)

    @pytest.mark.parametrize("asked", ["8.0", "sm_80", "61", "80;x", "al", "90a", ","])
    def test_architectures_that_are_none_fail(self, tmp_path, asked):
        """Also those that nvcc does not know; nothing but CUDA kernels would tell that they are missing."""
        done = pip_wheel(tmp_path, **fake_cuda_home(tmp_path, SEES % ("860", "")), VITPRUNE_CUDA_ARCHS=asked)
        assert done.returncode != 0
        assert f"VITPRUNE_CUDA_ARCHS must be all, or some that nvcc knows (80;86;90), got {asked}" in " ".join(done.stderr.split())

    @pytest.mark.skipif(NVCC is None, reason="no nvcc")
    @pytest.mark.parametrize("archs, seconds", [("all", 180), ("80", 45)])
    def test_nvcc(self, tmp_path, archs, seconds):
        """On two cores that do nothing else: the processors' time, which other work here does not lengthen."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = cubins(wheel(tmp_path, VITPRUNE_REQUIRE_NATIVE="cuda", VITPRUNE_CUDA_ARCHS=archs))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"wheel for {archs}: {took:.0f} s of processor time, {len(found)} cubins")
        assert found >= each_cubin(80)
        assert took < 2 * seconds

    def test_no_compiler(self, tmp_path):
        names = wheel(tmp_path, **NO_COMPILER)
        assert names >= NEEDED
        assert not has(names, ".so")

    def test_required_cpu_fails_without_compiler(self, tmp_path):
        done = pip_wheel(tmp_path, VITPRUNE_REQUIRE_NATIVE="cpu", **NO_COMPILER)
        assert done.returncode != 0 and "VITPRUNE_REQUIRE_NATIVE" in done.stderr and "/bin/false" in done.stderr, done.stderr

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
        assert not [name for name in names if name.startswith(".venv") or name.endswith((".so", ".cubin"))]
        names = wheel(tmp_path / "wheel", sdist)
        assert names >= NEEDED
        assert has(names, ".so")
        built, = (tmp_path / "wheel").glob("*.whl")
        python = borrowing(tmp_path / "other")
        run(python, "-m", "pip", "install", "--no-deps", "--ignore-installed", built).check_returncode()
        site, = (tmp_path / "other").glob("lib/python*/site-packages")
        assert report(python, tmp_path) == f"{site}/vitprune/__init__.py True [[1, 2]]"

    @pytest.mark.parametrize("compilers", [{}, NO_COMPILER], ids=["compiler", "no compiler"])
    def test_editable(self, tmp_path, compilers):
        """Installed without dependencies, over this interpreter's own packages."""
        python = borrowing(tmp_path / "env")
        done = run(python, "-m", "pip", "install", "--no-deps", "--ignore-installed", "-e", ROOT, **compilers)
        assert done.returncode == 0, done.stderr
        assert report(python, tmp_path) == f"{ROOT}/vitprune/__init__.py {not compilers} [[1, 2]]"
