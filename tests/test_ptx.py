"""Every Triton kernel as compiled for cards that are not here, its PTX run on the CPU (tests/ptx), forward and with its gradients."""
import importlib
import re

import pytest
import torch
from kernel_checks import INTERPRETED, compile_launch, record
from sanitize import SIZES, one_multiprocessor

from vitprune import cases, ops
from vitprune.cases import Size
from vitprune.ops import backend, registry
from vitprune.tune import Item, Trial

triton = pytest.importorskip("triton")
import ptx  # noqa: E402
from ptx import Fault  # noqa: E402
from vitprune.kernels import configs, policy_attention  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="kernels run in the interpreter, or on the GPU")
RANDOM_CASES = 40
KINDS = ("float32", "float16", "bfloat16")


def trial(case: str, kind: str, size: Size) -> Trial:
    found = Trial(Item(case, kind, size, False), torch.device("cpu"))
    if "triton" not in found.usable or registry.find(found.item.op, "triton").composite:
        pytest.skip("no kernel of its own")
    return found


def passes(found: Trial) -> None:
    with one_multiprocessor():
        reason = found.fails("triton")
    if reason and "tcgen05" in reason:
        pytest.skip("the products of compute capability 10.0 are not run here")
    assert reason is None, reason


@pytest.mark.parametrize("D", [64, 80])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [75, 90, 120])
def test_soft_and_empty_policies(arch, kind, D, compile_for):
    """Weights are products, and of rows that nothing but eps is left to the maximum has a gradient."""
    compile_for(arch)
    dtype, generator = getattr(torch, kind), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, D, generator=generator).to(dtype).unbind(0)
    for policy in (torch.linspace(0, 1, 40), torch.zeros(40)):
        args = [q, k, v, policy[None].to(dtype)]
        with backend("triton"):
            got = cases.run(ops.policy_attention, args, [q])
        truth = cases.run(ops.policy_attention, [t.double() for t in args], [q.double()])
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for a, b in zip(got, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("arch", [75, 90, 120, *(pytest.param(arch, marks=pytest.mark.long) for arch in (80, 86, 89, 100))])
def test_runs(arch, case, kind, compile_for):
    compile_for(arch)
    for size in SIZES[:3]:
        passes(trial(case, kind, size))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_runs_at_length(arch, case, kind, compile_for):
    """A picture of DeiT's, and all launch configurations that `vitprune tune` may choose for DeiT-S."""
    compile_for(arch)
    with configs.probing({}):  # by default, whatever is shipped
        passes(trial(case, kind, SIZES[3]))
    # attention's do not depend on heads; of one head alone a lane of a norm may hold one value
    for heads in (1,) if "attention" in case else (1, 6) if "norm" in case else (6,):
        with configs.probing({}) as asked:
            passes(found := trial(case, kind, Size(1, heads, 0.6, tokens=85)))
        for (op, _, dtype, shape) in asked:
            for config in configs.kernel(op).candidates(dtype, arch, **dict(shape))[1:]:
                with configs.probing({key: config if key[0] == op else None for key in asked}):
                    passes(found)


@pytest.mark.long
@pytest.mark.parametrize("stem, test", [
    *((stem, "test_kernel") for stem in ("add_norm", "layer_norm", "policy_attention_kernels", "score_tokens", "select_norm")),
    *((stem, "test_triton") for stem in ("compact_tokens", "short_attention_kernels", "sliced_linear", "sliced_mlp")),
    ("select_tokens", "test_triton_gradient")])
@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_random_cases(arch, stem, test, compile_for, poison):
    """Shapes, strides, dtypes and tiles, as those tests draw them."""
    compile_for(arch)
    run = getattr(importlib.import_module(f"test_{stem}"), test)
    run(*(("triton",) if test == "test_kernel" else ()), "cpu", RANDOM_CASES)


# --- what the machine is to find ------------------------------------------------------------------------------------------


def program(body: str) -> str:
    return (".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0\n)\n{\n\tld.param.b64 %rd1, [k_param_0];\n"
            f"\tmov.u32 %r1, %tid.x;\n{body}\n\tret;\n}}\n")


ADDRESS = "shl.b32 %r2, %r1, 2; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;"
COPY = "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4; cp.async.commit_group;"
FAULTS = {
    "outside of every tensor": "add.s64 %rd3, %rd3, 4; st.global.b32 [ %rd3 + 0 ], { %r1 };",
    "misaligned": "st.global.b32 [ %rd3 + 2 ], { %r1 };",
    "outside of 256 bytes": "st.shared.b32 [ %r2 + 8 ], %r1;",
    "unequal values": "and.b32 %r3, %r2, 15; st.shared.b32 [ %r3 + 0 ], %r1;",
    "another warp writes": "st.shared.b32 [ %r2 + 0 ], %r1; xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3];",
    "another warp reads": "xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3]; st.shared.b32 [ %r2 + 0 ], %r1;",
    "two warps": "and.b32 %r3, %r2, 127; setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [ %r3 + 0 ], %r1;"
                 "@!%p1 st.shared.b32 [ %r3 + 0 ], %r1;",
    "before it was waited for": COPY + "ld.shared.b32 %r4, [%r2];",
    "some threads of a block miss": "setp.lt.u32 %p1, %r1, 7; @%p1 bra $L; bar.sync 0; $L: mov.b32 %r4, 0;",
    "some of its threads miss": "setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;",
    "unknown": "no.such.thing %r4, %r1;",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    x = torch.arange(64, dtype=torch.int32)
    with pytest.raises(Fault, match=re.escape(fault)):
        ptx.run(program(ADDRESS + FAULTS[fault]), [x], (1,), 64, 256)


@pytest.mark.parametrize("body, result", [
    ("st.shared.b32 [ %r2 + 0 ], %r1; bar.sync 0; xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3];", lambda i: i ^ 32),
    (COPY + "cp.async.wait_group 0; ld.shared.b32 %r4, [%r2];", lambda i: 3 * i),
    ("mov.b32 %r4, 0; $L: add.s32 %r4, %r4, 1; setp.lt.s32 %p1, %r4, %r1; @%p1 bra $L;", lambda i: max(i, 1)),
    ("shfl.sync.up.b32 %r4, %r1, 3, 0, -1;", lambda i: i - 3 if i % 32 >= 3 else i),
    ("redux.sync.add.s32 %r4, %r1, -1;", lambda i: sum(range(i // 32 * 32, i // 32 * 32 + 32))),
    ("bfe.s32 %r4, %r1, 2, 2;", lambda i: (i >> 2 & 3) - 4 * (i >> 3 & 1)), ("bfe.u32 %r4, %r1, 2, 2;", lambda i: i >> 2 & 3),
    ("neg.s32 %r3, %r1; div.s32 %r4, %r3, 4;", lambda i: -(i // 4)), ("neg.s32 %r3, %r1; rem.s32 %r4, %r3, 4;", lambda i: -(i % 4)),
    ("mul.hi.u32 %r4, %r1, 0x80000000;", lambda i: i // 2),
    ("cvt.s64.s32 %rd4, %r1; mul.hi.s64 %rd4, %rd4, -9223372036854775808; cvt.u32.u64 %r4, %rd4;", lambda i: -((i + 1) // 2)),
    ("shl.b32 %r3, %r1, 24; prmt.b32 %r4, %r3, 0, 0x7773U;", lambda i: i),
    ("cvt.rn.f32.s32 %r3, %r1; fma.rn.f32 %r3, %r3, 0f40000000, 0f3F800000; cvt.rzi.s32.f32 %r4, %r3;", lambda i: 2 * i + 1),
    ("add.s32 %r3, %r1, -40; setp.lt.u32 %p1, %r3, 10; selp.b32 %r4, 1, 0, %p1;", lambda i: int(40 <= i < 50)),
])
def test_instructions(body, result):
    x = 3 * torch.arange(64, dtype=torch.int32)
    ptx.run(program(f"{ADDRESS} {body} st.global.b32 [ %rd3 + 0 ], {{ %r4 }};"), [x], (1,), 64, 256)
    assert x.tolist() == [result(i) for i in range(64)]


@pytest.mark.parametrize("arch, without, fault", [
    *((arch, r"bar\.sync\s+0;", "race") for arch in (80, 90)),
    *((arch, r"cp\.async\.wait_group\s+\d+;", "before it was waited for") for arch in (80, 90)),
    (90, r"wgmma\.wait_group\S*\s+\d+;", "before it was waited for"), (90, r"wgmma\.fence\S*;", "written without a fence"),
    (90, r"fence\.proxy\.async\S*;", "without fence.proxy.async")])
def test_a_kernel_without(arch, without, fault, monkeypatch):
    """What a compiler might forget."""
    monkeypatch.setattr(configs, "capability", lambda device: arch)
    q = torch.randn(1, 1, 200, 64, dtype=torch.float16)
    launch, = record(monkeypatch, policy_attention, lambda: policy_attention.launch(q, q, q, torch.ones(1, 200), 0.125, 1e-6))
    built = compile_launch(*launch, arch)
    ptx.run(built["ptx"], built["values"], (1,), 32 * built["warps"], built["shared"])
    with pytest.raises(Fault, match=fault):
        ptx.run(re.sub(without, "", built["ptx"]), built["values"], (1,), 32 * built["warps"], built["shared"])
