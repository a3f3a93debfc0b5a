"""tests/emulator.cpp shows what a card would do wrong and a CPU would hide."""
import signal
import subprocess
import sys

import pytest

PROBE = """
#include "cuda/device.h"

struct ProbeParams {
  float *out;           // [blocks, 4]
  long long at, block;  // that block alone writes what it reads; all write so far past the end, where that is not negative
};

extern "C" __global__ void probe(const ProbeParams p) {
  SHARED(float[4], values);
  float *end = values + 4;
  if (blockIdx.x == p.block) values[threadIdx.x] = threadIdx.x;
  if (p.at >= 0) end[p.at] = 0;
  p.out[4 * blockIdx.x + threadIdx.x] = values[threadIdx.x];
}
"""
RUN = """
import ctypes, sys
library, out = ctypes.CDLL(sys.argv[1]), (ctypes.c_float * 12)()
params = (ctypes.c_longlong * 3)(ctypes.addressof(out), int(sys.argv[2]), 1)
library.emulate(library.probe, (ctypes.c_uint * 2)(3, 1), 4, params)
print(*out)
"""


@pytest.mark.parametrize("at, status, printed", [(-1, 0, "nan nan nan nan 0.0 1.0 2.0 3.0 nan nan nan nan"), (0, -signal.SIGSEGV, "")])
def test_shared_memory(cuda_library, tmp_path, at, status, printed):
    """What no thread of this block wrote is NaN, though the block before did; the first byte past the end faults."""
    source = tmp_path / "probe.cu"
    source.write_text(PROBE)
    done = subprocess.run([sys.executable, "-c", RUN, cuda_library(source, 80), str(at)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (status, printed), done.stderr
