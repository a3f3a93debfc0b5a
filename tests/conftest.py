"""What holds for every test: nothing that was tuned on this machine; and for kernels under Triton's interpreter."""
import numpy as np
import pytest
import torch
from kernel_checks import INTERPRETED


@pytest.fixture(autouse=True, scope="session")
def _untuned(tmp_path_factory):
    """`vitprune tune` may have been run here; tests see the operators' own order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=INTERPRETED)
def _round(monkeypatch):
    """The interpreter cuts float32 off to bfloat16; cards round to nearest, and so does it here."""
    import triton.language as tl
    from triton.runtime import interpreter
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, src, kind):
        if src.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, kind.scalar)
        return cast(self, src, kind)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


@pytest.fixture
def poison():
    """Uninitialised memory is NaN, so a value that a kernel forgot to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
