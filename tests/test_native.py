"""Finding, compiling, caching and refusing compiled backends."""
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_checks import CPP

from vitprune import native, nvrtc
from vitprune.doctor import report, text
from vitprune.native import select_tokens as native_select_tokens
from vitprune.ops import backend, policy_attention, registry, select_tokens, short_attention, split_qkv

CUDA = torch.device("cuda", 0)


def test_cubin_of_the_same_major_and_no_higher_minor(tmp_path, monkeypatch):
    for arch in (80, 86, 90):
        (tmp_path / f"op.sm{arch}.cubin").touch()
    monkeypatch.setattr(native, "_native", object())
    monkeypatch.setattr(native, "_cubin_folder", lambda: tmp_path)
    chosen = {c: p and p.name for c in ((8, 0), (8, 6), (8, 9), (9, 0), (7, 5), (10, 0)) if [p := native.cubin_path("op", c)]}
    assert chosen == {(8, 0): "op.sm80.cubin", (8, 6): "op.sm86.cubin", (8, 9): "op.sm86.cubin", (9, 0): "op.sm90.cubin",
                      (7, 5): None, (10, 0): None}


def test_cubin_of_cards_that_are_not_built_for(tmp_path, monkeypatch):
    """The list of wheels: same major and an older minor, but for Jetsons; what is left is compiled for the card itself, or as PTX."""
    for arch in (61, 70, 75, 80, 86, 89, 90, 100, 120):
        (tmp_path / f"op.sm{arch}.cubin").touch()
    monkeypatch.setattr(native, "_native", object())
    monkeypatch.setattr(native, "_cubin_folder", lambda: tmp_path)
    cards = [(6, 2), (7, 2), (8, 7), (8, 8), (8, 9), (10, 1), (10, 3), (11, 0), (12, 1)]
    assert {c: path.name for c in cards if (path := native.cubin_path("op", c))} == {
        (8, 9): "op.sm89.cubin", (10, 3): "op.sm100.cubin", (12, 1): "op.sm120.cubin"}
    monkeypatch.setattr(nvrtc, "architectures", lambda: [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121])
    assert [nvrtc.target(c) for c in ((8, 7), (8, 8), (11, 0))] == ["sm_87", "sm_88", "sm_110"]
    monkeypatch.setattr(nvrtc, "architectures", lambda: [61, 70, 75, 80, 86, 89, 90])
    assert [nvrtc.target(c) for c in ((8, 7), (8, 8), (11, 0))] == ["compute_86", "compute_86", "compute_90"]
    for own in (87, 110):
        (tmp_path / f"op.sm{own}.cubin").touch()
    assert native.cubin_path("op", (8, 7)).name == "op.sm87.cubin" and native.cubin_path("op", (11, 0)).name == "op.sm110.cubin"
    assert native.cubin_path("op", (8, 9)).name == "op.sm89.cubin"
    (tmp_path / "op.sm89.cubin").unlink()
    assert native.cubin_path("op", (8, 9)).name == "op.sm86.cubin"  # never 87's


def test_cubin_that_the_driver_refuses(tmp_path, monkeypatch):
    """What NVRTC makes serves instead; without one the driver's own error comes through."""
    (tmp_path / "op.sm80.cubin").write_bytes(b"cubin")

    class Driver:
        @staticmethod
        def load_kernel(image, name, index):
            if image == b"cubin":
                raise RuntimeError("f: no kernel image is available")
            return image, name, index
    monkeypatch.setattr(native, "_native", Driver)
    monkeypatch.setattr(native, "_cubin_folder", lambda: tmp_path)
    monkeypatch.setattr(native, "capability", lambda device: (8, 0))
    monkeypatch.setattr(nvrtc, "target", lambda capability: "sm_80")
    monkeypatch.setattr(nvrtc, "compiled", lambda op, arch: f"{op} {arch}".encode())
    monkeypatch.setattr(nvrtc, "library", object)
    assert native.kernel.__wrapped__("op", "f", 1) == (b"op sm_80", "f", 1)
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    with pytest.raises(RuntimeError, match="^f: no kernel image is available$"):
        native.kernel.__wrapped__("op", "f", 1)


def test_reasons(monkeypatch):
    assert native.reason_cpp(CUDA) == "runs on the CPU, not on cuda"
    monkeypatch.setattr(native, "_missing", "no compiler")
    assert native.reason_cpp(torch.device("cpu")) == "no compiler"
    assert native.reason_cuda(CUDA, "select_tokens") == "no compiler"


def test_reason_without_cubin_and_nvrtc(monkeypatch):
    monkeypatch.setattr(native, "_missing", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(native, "cubin_path", lambda *_: None)
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    assert native.reason_cuda(CUDA, "select_tokens").startswith(nvrtc.MISSING)


@pytest.mark.parametrize("asked", ["8.0", "sm_80", "80,", "12"])
def test_forced_architecture(monkeypatch, asked):
    """Where there is an NVRTC to know architectures by; without one the form alone is refused."""
    monkeypatch.setattr(native, "_missing", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("VITPRUNE_CUDA_ARCH", asked)
    if nvrtc.library():
        listed = " ".join(map(str, nvrtc.architectures()))
        message = re.escape(f"VITPRUNE_CUDA_ARCH must be an architecture that NVRTC compiles for ({listed}), got {asked!r}")
        with backend("cuda"), pytest.raises(ValueError, match=message):
            registry.choose("select_tokens", CUDA, torch.float32, scores=torch.float32, many=False, large=False)
        with pytest.raises(ValueError, match=message):
            report()
        monkeypatch.setenv("VITPRUNE_CUDA_ARCH", "90")
        with pytest.raises(ValueError, match="VITPRUNE_CUDA_ARCH must be at most 80 on this card, got '90'"):
            native.capability(CUDA)
        monkeypatch.setenv("VITPRUNE_CUDA_ARCH", "75")
        assert "forced     CUDA kernels of 7.5 (VITPRUNE_CUDA_ARCH)" in text(report())
        assert native.capability(CUDA) == (7, 5) and native.reason_cuda(CUDA, "select_tokens") is None
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    monkeypatch.setenv("VITPRUNE_CUDA_ARCH", "61")
    assert native.reason_cuda(CUDA, "select_tokens") == f"{nvrtc.MISSING}, and VITPRUNE_CUDA_ARCH needs it"
    monkeypatch.setenv("VITPRUNE_CUDA_ARCH", "6.1")
    with pytest.raises(ValueError, match=r"VITPRUNE_CUDA_ARCH must be .* \(75 \.\.\.\), got '6\.1'"):
        native.capability(CUDA)


def test_forced_backend_raises_its_reason():
    with backend("cuda"), pytest.raises(RuntimeError, match="cannot run here: runs on an NVIDIA GPU, not on cpu"):
        select_tokens(torch.ones(1, 3, 4), torch.ones(1, 2), 1)


@pytest.mark.skipif(native.reason_cpp(torch.device("cpu")) is not None, reason="the C++ extension is not installed")
def test_float8_rows_and_unknown_scores():
    x = torch.randn(2, 5, 16).to(torch.float8_e4m3fn)
    tokens, _ = native_select_tokens.cpp(x, torch.arange(8.0).view(2, 4), 2, 1)
    assert torch.equal(tokens.view(torch.uint8), x.view(torch.uint8)[:, [0, 3, 4]])
    assert native_select_tokens.refuses_cpp(torch.device("cpu"), torch.float32, scores=torch.float8_e4m3fn) == \
        "no kernel for scores of torch.float8_e4m3fn"


def includes(path: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE))


def test_sources_include_no_torch():
    """Nothing of it in csrc, Python in one file, and in device code nothing but its own headers and what NVRTC brings."""
    csrc = Path(__file__).parents[1] / "csrc"
    sources = [path for path in csrc.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    own = {path.name for path in sources}
    assert {"bind.cpp", "device.h", "simd.h", "select_tokens.cu"} <= own
    for path in sources:
        foreign = {name for name in includes(path) if Path(name).name not in own}
        if path.parent.name == "cuda":
            assert foreign <= {"cuda_fp16.h", "cuda_bf16.h"}, path
        library = {name.partition("/")[0].lower() for name in foreign}
        assert not library & {"torch", "aten", "c10", "caffe2"}, path
        assert path.name == "bind.cpp" or not library & {"pybind11", "python.h"}, path


WIDTHS = {"base": []}
if platform.machine() == "x86_64":
    WIDTHS |= {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"]}


def check_cpu_kernels(folder: Path, widths: dict[str, list[str]], *common: str, under: tuple[str, ...] = ()) -> None:
    """Against plain loops in double (tests/cpu_kernels.cpp)."""
    tests = Path(__file__).parent
    csrc = tests.parent / "csrc"
    common = [*common, "-std=c++17", "-g", "-fopenmp", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi", "-Werror",
              "-I", csrc, "-I", tests]
    simd = sorted((csrc / "cpu").glob("*_simd.cpp"))
    objects = sorted({*(csrc / "cpu").glob("*.cpp")} - {*simd})
    for source in simd:
        for width, flags in widths.items():
            objects.append(folder / f"{source.stem}.{width}.o")
            subprocess.run([*common, *flags, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([*common, tests / "cpu_kernels.cpp", *objects, "-o", folder / "run"], check=True)
    done = subprocess.run([*under, folder / "run"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = {*done.stdout.split()}
    print(f"vectors that ran: {', '.join(sorted(ran))}; not on this processor: {', '.join(sorted({*widths} - ran)) or 'none'}")
    assert {"base", "widest"} <= ran


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_cpu_kernels_at_every_width_and_under_sanitizers(tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer."""
    check_cpu_kernels(tmp_path, WIDTHS, "c++", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.long
def test_cpu_kernels_on_arm(tmp_path):
    """Cross-compiled for aarch64 and emulated (Debian's g++-aarch64-linux-gnu and qemu-user-static); the binding compiles there too."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ or qemu-aarch64-static")
    check_cpu_kernels(tmp_path, {"base": []}, compiler, "-O2", "-static", under=(emulator,))
    csrc, pybind11 = Path(__file__).parents[1] / "csrc", pytest.importorskip("pybind11")
    for source in (*csrc.glob("*.cpp"), *(csrc / "cpu").glob("*.cpp")):
        subprocess.run([compiler, "-std=c++17", "-fsyntax-only", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-I", csrc,
                        "-I", pybind11.get_include(), "-I", sysconfig.get_path("include"), source], check=True)


@CPP
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="not Linux")
def test_threads_are_those_of_torch(tmp_path):
    """One OpenMP library in a process of torch and this package: two would each keep threads of their own."""
    code = "import vitprune.native; print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    libraries = done.stdout.split()
    assert len(libraries) == 1, libraries


@CPP
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_traced_graph_given_what_its_kernel_cannot_read(dtype):
    """The choice is made when it is traced; a kernel must not read other numbers as if they were its own."""
    q, policy, qkv, x = torch.randn(1, 2, 9, 16), torch.ones(1, 9), torch.randn(1, 9, 96), torch.randn(1, 9, 4)
    cases = [(lambda q, p: policy_attention(q, q, q, p), (q, policy), (q.to(dtype), policy)),
             (lambda x: short_attention(x, num_heads=2), (qkv,), (qkv.to(dtype),)),
             (lambda x, s: select_tokens(x, s, 6)[0], (x, torch.randn(1, 8)), (x[:, :5], torch.randn(1, 4)))]
    with torch.no_grad(), backend("cpp"):
        traced = [torch.jit.trace(call, given, check_trace=False) for call, given, _ in cases]
    for graph, (_, _, other) in zip(traced, cases):
        with torch.no_grad(), pytest.raises(RuntimeError, match="the kernel that was chosen does not take tensors like these"):
            graph(*other)
    half = q.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"policy_attention.*\[1, 2, 9, 16\] float32 on cpu, \[1, 2, 9, 16\] bfloat16"):
        torch.ops.vitprune.policy_attention(q, half, q, policy, 1.0, 0.0, "cpp")
    with pytest.raises(RuntimeError, match="short_attention.*int64"):
        torch.ops.vitprune.short_attention(qkv[0], 2, torch.tensor([0, 9]), 9, 1.0, "cpp")


@CPP
def test_gradients_in_batches():
    torch.manual_seed(0)
    q, policy = torch.randn(1, 2, 5, 16, requires_grad=True), torch.rand(1, 5, requires_grad=True)
    ups = torch.randn(3, 1, 2, 5, 16)
    with backend("cpp"):
        out = policy_attention(q, q, q, policy)
    each = [torch.autograd.grad(out, (q, policy), up, retain_graph=True) for up in ups]
    together = torch.autograd.grad(out, (q, policy), ups, is_grads_batched=True)
    for got, expected in zip(together, zip(*each)):
        torch.testing.assert_close(got, torch.stack(expected))
    qkv = torch.randn(1, 5, 96, requires_grad=True)
    with backend("cpp"):
        out = policy_attention(*split_qkv(qkv, 2), policy)
    each = [torch.autograd.grad(out, qkv, up, retain_graph=True)[0] for up in ups]
    torch.testing.assert_close(torch.autograd.grad(out, qkv, ups, is_grads_batched=True)[0], torch.stack(each))


@CPP
def test_a_thousand_calls_from_thirty_two_threads():
    torch.manual_seed(0)
    q, policy, qkv = torch.randn(2, 2, 33, 16), torch.rand(2, 33), torch.randn(2, 33, 96)
    x, scores = torch.randn(2, 33, 8), torch.rand(2, 32)

    def call(i):
        leaf = q.clone().requires_grad_(i % 4 == 0)
        with backend("cpp"):
            out = policy_attention(leaf, leaf, leaf, policy)
            gradient = torch.autograd.grad(out.square().sum(), leaf) if leaf.requires_grad else ()
            with torch.no_grad():
                return out.detach(), short_attention(qkv, num_heads=2), select_tokens(x, scores, 9)[0], *gradient
    expected = call(0)
    with ThreadPoolExecutor(32) as pool:
        for got in pool.map(call, range(1000)):
            assert all(torch.equal(a, b) for a, b in zip(got, expected))


@CPP
def test_any_number_of_threads_computes_the_same_bits():
    torch.manual_seed(0)
    leaves, qkv = [torch.randn(3, 3, 70, 32, requires_grad=True) for _ in range(3)] + [torch.rand(3, 70)], torch.randn(5, 70, 3 * 96)
    x, scores, before = torch.randn(9, 70, 8), torch.rand(9, 69), torch.get_num_threads()

    def results(threads):
        torch.set_num_threads(threads)
        with backend("cpp"):
            out = policy_attention(*leaves)
            with torch.no_grad():
                rest = short_attention(qkv, num_heads=3), select_tokens(x, scores, 9)[0]
            return out.detach(), *torch.autograd.grad(out.square().sum(), leaves[:3]), *rest
    try:
        one, four = results(1), results(4)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))
