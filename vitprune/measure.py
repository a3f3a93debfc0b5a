"""Parameters and multiply-accumulates of dense and pruned models, counted in two independent ways that must agree.

Published "FLOPs" of vision transformers are multiply-accumulates (MACs). Two conventions are in use, both given here:
"fvcore" counts matrix products, convolutions and attention without biases, plus normalisation and resampling at fvcore's
rates (LayerNorm: 5 an element); "matmul" counts matrix products, convolutions and attention only. Softmax, GELU,
additions, sorting and gathering count nothing in either.
"""
import copy
import logging
import warnings
from dataclasses import asdict, dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .dense import unwatched
from .ops.registry import MACS, backend

# What fvcore counts that is a product of matrices; the rest of what it counts is normalisation and resampling.
PRODUCTS = {"linear", "conv", "matmul", "mm", "bmm", "addmm", "einsum", "scaled_dot_product_attention", *MACS} - {"layer_norm"}

# Operators that cost nothing in both conventions and carry no tag that says so: copies, indexing, ordering, pooling, and
# normalisation (which fvcore counts and torch does not). Anything in neither list is an error.
FREE = set("""
_log_softmax _safe_softmax _softmax _native_batch_norm_legit _native_batch_norm_legit_no_training _to_copy
_unsafe_view _reshape_copy adaptive_avg_pool2d
_adaptive_avg_pool2d adaptive_max_pool2d all any amax amin arange argmax argmin argsort as_strided avg_pool2d
batch_norm cat clone concat constant_pad_nd contiguous copy_ cumsum detach dropout embedding empty empty_like empty_strided
expand_as eye feature_dropout fill_ flatten full full_like gather gelu glu group_norm hardsigmoid hardswish hardtanh
im2col index index_copy index_fill index_put index_select instance_norm layer_norm leaky_relu lift_fresh linspace
linalg_vector_norm log_softmax max max_pool2d max_pool2d_with_indices mean min native_batch_norm native_dropout
native_group_norm native_layer_norm new_empty new_full new_ones new_zeros norm ones ones_like pad pixel_shuffle
pixel_unshuffle rand randn repeat repeat_interleave roll rms_norm _fused_rms_norm scalar_tensor scatter searchsorted
select_scatter silu softmax sort split split_with_sizes squeeze stack std std_mean sum tile to topk tril triu unflatten unfold
upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var var_mean zeros zeros_like
ScalarImplicit Int __and__ __or__ __not__ size numel floor_divide remainder expand reshape view permute transpose t chunk
unsqueeze slice select narrow unbind masked_fill where
""".split())


class CountError(RuntimeError):
    """The two counts disagree, or an operator has no known cost."""


@dataclass(frozen=True)
class Counts:
    """Costs of one image.

    params: parameters that exist. macs: fvcore's convention, the published one. macs_matmul: matrix products,
    convolutions and attention only. by_kind: macs by kind of operator. by_module: macs by direct submodule and kind.
    """
    params: int
    macs: int
    macs_matmul: int
    by_kind: dict[str, int]
    by_module: dict[str, dict[str, int]]

    def as_dict(self) -> dict:
        """Everything by name, with both conventions spelled out."""
        return {"macs_convention": "fvcore: linear, convolution, matrix product and attention without biases, "
                                   "LayerNorm 5 per element; 1 MAC = 2 FLOPs",
                "macs_matmul_convention": "torch.utils.flop_counter / 2: linear, convolution, matrix product, attention",
                **asdict(self)}


def count(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Counts:
    """Parameters and MACs of `model` in evaluation, for one image of `input_size` (channels, height, width).

    Any timm model, dense or pruned. Of a masked model what runs is counted (live heads and hidden blocks), its parameters
    are those that exist; `compact` makes the two agree. torch's counter runs on the meta device, fvcore on a trace of one image on the CPU.
    Raises ValueError in training mode, for models whose count depends on the image (`threshold`) and where input_size is
    not known; CountError for an operator nobody counts and where torch's counter and fvcore disagree.
    """
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(f"count: model must be in evaluation mode (call model.eval()), {training[0]} is in training mode")
    if getattr(getattr(model, "tokens", None), "threshold", None) is not None:
        raise ValueError("count: model must keep a fixed number of tokens; with tokens.threshold the cost depends on the image")
    input_size = tuple(input_size or image_size(model))
    if len(input_size) != 3 or any(not isinstance(n, int) or n < 1 for n in input_size):
        raise ValueError(f"count: input_size must be (channels, height, width), got {input_size}")
    images = torch.zeros(1, *input_size, device="cpu", dtype=next(model.parameters()).dtype)
    with torch.no_grad(), warnings.catch_warnings(), backend("reference"), unwatched():
        warnings.simplefilter("ignore")  # the tracer's remarks on shapes
        matmul = _by_torch(_twin(model, "meta"), images.to("meta"))
        by_kind, by_module = _by_fvcore(_twin(model, "cpu"), images)
    products = sum(n for kind, n in by_kind.items() if kind in PRODUCTS)
    if products != matmul:
        raise CountError(f"count: torch counts {matmul:,} MACs and fvcore {products:,} in the matrix products of {type(model).__name__}")
    return Counts(sum(p.numel() for p in model.parameters()), sum(by_kind.values()), matmul, by_kind, by_module)


def image_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that the model was made for; raises ValueError where it does not say."""
    patches = getattr(model, "patch_embed", None)
    if getattr(patches, "img_size", None) is not None:
        channels = next(m.in_channels for m in patches.modules() if isinstance(m, nn.Conv2d))
        return (channels, *patches.img_size)
    config = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" not in config:
        raise ValueError(f"count: input_size must be given, {type(model).__name__} does not say for which images it was made")
    return tuple(config["input_size"])


def _twin(model: nn.Module, device: str) -> nn.Module:
    """A copy on another device that leaves the original and its weights alone; on the CPU it shares their storage."""
    def move(t: Tensor) -> Tensor:
        return torch.zeros((), dtype=t.dtype, device=device).expand(t.shape) if t.is_meta and device != "meta" else t.detach().to(device)

    memo = {id(p): nn.Parameter(move(p), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): move(b) for b in model.buffers()}
    twin = copy.deepcopy(model, memo)
    twin._buffers.pop("_untrained", None)  # the shapes do not depend on which tokens stay: no warning
    return twin


class _Seen(TorchDispatchMode):
    """Every operator that runs below torch's counter; one without a known cost raises."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func._overloadpacket
        known = packet in flop_registry or func.is_view or torch.Tag.pointwise in func.tags
        if not known and (func.namespace != "aten" or packet.__name__.removesuffix("_") not in FREE):
            raise CountError(f"count: operator {func} has no known cost; register a formula (torch.utils.flop_counter."
                             "register_flop_formula)")
        return func(*args, **(kwargs or {}))


def _by_torch(model: nn.Module, images: Tensor) -> int:
    with _Seen(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2


def _by_fvcore(model: nn.Module, images: Tensor) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(model, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention, "aten::einsum", _einsum,
                           "vitprune::add_norm", _norm, "vitprune::layer_norm", _norm)
    for op in MACS:
        if op not in ("add_norm", "layer_norm"):
            analysis.set_op_handle(f"vitprune::{op}", lambda inputs, outputs, op=op: MACS[op](*map(_value, inputs)))
    analysis.total()
    unknown = [op for op in analysis.unsupported_ops() if not _free(op)]
    if unknown:
        raise CountError(f"count: operator {', '.join(sorted(unknown))} has no known cost")
    kinds = {k: int(n) for k, n in analysis.by_operator().items() if n}
    modules = {name: {k: int(n) for k, n in ops.items() if n}
               for name, ops in analysis.by_module_and_operator().items() if name and "." not in name and sum(ops.values())}
    return kinds, modules


def _free(op: str) -> bool:
    namespace, name = op.split("::")
    if namespace in ("prim", "onnx"):
        return True
    if namespace != "aten":
        return False
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    return name.removesuffix("_") in FREE or any(torch.Tag.pointwise in o.tags or o.is_view for o in overloads)


def _value(v) -> list[int] | int | float | str | None:
    """A traced argument as torch's counter hands it to formulas: tensors are shapes."""
    return v.type().sizes() if v.isCompleteTensor() else v.toIValue()


def _attention(inputs, outputs) -> int:  # q [..., N, D], k [..., M, D], v [..., M, E]
    q, k, v = (v.type().sizes() for v in inputs[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _einsum(inputs, outputs) -> int:
    """Two operands: the size of the space of all indices (fvcore's own rounds large counts)."""
    terms = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
    sizes = {}
    for term, v in zip(terms, inputs[1].node().inputs()):
        sizes |= dict(zip(term, v.type().sizes()))
    if len(terms) != 2 or "." in "".join(terms):
        raise CountError(f"count: einsum {inputs[0].toIValue()} has no known cost: not two operands with named indices")
    return prod(sizes.values())


def _norm(inputs, outputs) -> dict[str, int]:
    from collections import Counter
    return Counter({"layer_norm": 5 * prod(inputs[0].type().sizes())})
