"""CUDA sources compiled at first use: once, safely among processes, and with the compiler's words where it fails."""
import os
import threading
from pathlib import Path

import pytest
import torch

from vitprune import nvrtc
from vitprune.ops import registry, select_tokens

needs_nvrtc = pytest.mark.skipif(nvrtc.library() is None, reason=nvrtc.MISSING)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_nvrtc
def test_compiled_once_per_source_and_architecture(cache, monkeypatch):
    image = nvrtc.compiled("select_tokens", "sm_86")
    file, = cache.iterdir()
    assert file.read_bytes().startswith(image)
    assert file.name.startswith("select_tokens.sm_86.nvrtc")
    nvrtc.compiled("select_tokens", "sm_90")
    assert len(list(cache.iterdir())) == 2
    source, headers = nvrtc.sources("select_tokens")
    monkeypatch.setattr(nvrtc, "sources", lambda op: (source, headers | {"params.h": headers["params.h"] + "// x"}))
    nvrtc.compiled("select_tokens", "sm_90")
    assert len(list(cache.iterdir())) == 3

    def fail(*_):
        raise AssertionError("compiled again")
    monkeypatch.setattr(nvrtc, "build", fail)
    nvrtc.compiled("select_tokens", "sm_90")


def test_reader_never_sees_half_a_file(cache):
    path, images, torn = cache / "image", [bytes([i]) * (1 << 20) for i in (1, 2)], []
    nvrtc.write(path, images[0])
    stop = threading.Event()

    def read():
        while not stop.is_set():
            if path.read_bytes() not in images:
                torn.append(1)
    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        nvrtc.write(path, images[i % 2])
    stop.set()
    reader.join()
    assert not torn
    assert [p.name for p in cache.iterdir()] == ["image"]


def test_failed_write_leaves_the_old_file(cache, monkeypatch):
    nvrtc.write(cache / "image", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        nvrtc.write(cache / "image", b"new")
    assert [(p.name, p.read_bytes()) for p in cache.iterdir()] == [("image", b"old")]


@needs_nvrtc
def test_cache_that_cannot_be_written(cache):
    cache.write_text("a file where the folder should be")
    assert nvrtc.compiled("select_tokens", "sm_80")[:4] == b"\x7fELF"


@needs_nvrtc
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:len(b) // 2], lambda b: b[:999] + bytes([b[999] ^ 1]) + b[1000:]],
                         ids=["empty", "cut", "flipped"])
def test_damaged_cache_is_compiled_anew(cache, damage):
    image = nvrtc.compiled("select_tokens", "sm_80")
    file, = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert nvrtc.compiled("select_tokens", "sm_80") == image
    assert file.read_bytes() == whole


def test_user_without_a_home(monkeypatch, tmp_path):
    for name in ("VITPRUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def missing():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "home", missing)
    registry.reload()
    assert select_tokens(torch.ones(1, 4, 2), torch.tensor([[1., 3., 2.]]), 2)[1].tolist() == [[1, 2]]
    with pytest.raises(OSError):  # noqa: PT011 (which one depends on the system); `compiled` goes on without
        nvrtc.write(nvrtc.cache_folder() / "image", b"")
    monkeypatch.setenv("VITPRUNE_CACHE", str(tmp_path))
    assert nvrtc.cache_folder() == tmp_path


@needs_nvrtc
def test_compile_error_shows_the_log():
    with pytest.raises(RuntimeError, match=r"(?s)^broken: NVRTC failed for sm_80: NVRTC_ERROR_COMPILATION.*broken.cu.*oops"):
        nvrtc.build("broken", "oops", {}, "sm_80")


@needs_nvrtc
def test_compiler_that_warns_is_heard():
    assert "never referenced" in nvrtc.build("careless", "__global__ void f() { int unused; }", {}, "sm_80")[1]


@needs_nvrtc
def test_target():
    assert nvrtc.target((9, 0)) == "sm_90"
    newest = nvrtc.architectures()[-1]
    assert nvrtc.target((99, 0)) == f"compute_{newest}"
    assert b".target sm_" in nvrtc.build("select_tokens", *nvrtc.sources("select_tokens"), nvrtc.target((99, 0)))[0]
    with pytest.raises(RuntimeError, match=r"no target for compute capability 3\.5; the oldest it knows is"):
        nvrtc.target((3, 5))
