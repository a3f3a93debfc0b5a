"""Ways to run a model for speed: one signature, images [B, C, H, W] -> logits [B, classes]."""
import copy
import importlib.util
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .dense import unwatched
from .ops.registry import for_graph

Engine = Callable[[Tensor], Tensor]


class Unavailable(RuntimeError):
    """An engine cannot run here; the message is the reason."""


def accelerate(model: nn.Module, batch_size: int, dtype: torch.dtype = torch.float32,
               device: str | torch.device | None = None, input_size: tuple[int, int, int] | None = None) -> "Accelerated":
    """A copy of `model` made fast for one batch size: a callable module, images [batch_size, C, H, W] -> logits.

    On a GPU the whole model is one CUDA graph; a dense one is tried in this package's modules too. On a CPU plain evaluation, the
    same with weights laid out beforehand, OpenVINO where it is installed, and torch.compile are tried (this takes up to a minute or two).
    The fastest is kept; `.engine` says which. Images are cast to dtype and device. The argument is untouched.
    device: the model's own by default. Raises ValueError for models whose shapes depend on the image (`threshold`, on a GPU).
    """
    from .measure import image_size

    if batch_size < 1:
        raise ValueError(f"accelerate: batch_size must be >= 1, got {batch_size}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"accelerate: dtype must be a floating point torch.dtype, got {dtype!r}")
    device = torch.device(device or next(model.parameters()).device)
    if device.type == "cuda" and getattr(getattr(model, "tokens", None), "threshold", None) is not None:
        raise ValueError("accelerate: model must keep a fixed number of tokens; with tokens.threshold shapes depend on the image")
    copied = copy.deepcopy(model).to(device, dtype).eval()
    images = torch.randn(batch_size, *(input_size or image_size(model)), device=device, dtype=dtype)
    engines: dict[str, Engine] = {}
    for name in ("cuda_graph", "modules:cuda_graph") if device.type == "cuda" else ("eager", "packed", "openvino", "compiled"):
        if name == "modules:cuda_graph" and hasattr(model, "learning"):  # in our modules already
            continue
        try:
            engine = build(name, copied, images)
            engine(images)
        except Exception as e:
            if not engines:
                raise
            if not isinstance(e, Unavailable):  # no compiler, say: another engine serves
                why = (str(e).splitlines() or [""])[0]
                warnings.warn(f"accelerate: {name} does not work here ({type(e).__name__}: {why})", stacklevel=2)
        else:
            engines[name] = engine
    best = fastest(engines, images) if len(engines) > 1 else next(iter(engines))
    return Accelerated(getattr(engines[best], "model", copied), best, engines[best], images)


class Accelerated(nn.Module):
    """What `accelerate` returns: the model, the engine that runs it and the input it was made for."""

    def __init__(self, model: nn.Module, engine: str, run: Engine, images: Tensor) -> None:
        super().__init__()
        self.model, self.engine, self._run = model, engine, run
        self._shape, self._dtype, self._device = tuple(images.shape), images.dtype, images.device
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images of the shape it was made for -> logits, a new tensor; raises ValueError for another shape."""
        if tuple(images.shape) != self._shape:
            raise ValueError(f"accelerate: images must be [B, C, H, W] = {self._shape}, got {tuple(images.shape)}")
        return self._run(images.to(self._device, self._dtype))

    def train(self, mode: bool = True) -> "Accelerated":
        """Evaluation only; raises RuntimeError when asked to train."""
        if mode:
            raise RuntimeError("accelerate: an accelerated model cannot train; train the model it was made from")
        return super().train(False)


def fastest(engines: dict[str, Engine], images: Tensor, rounds: int = 5) -> str:
    """The name of the engine with the lowest median, interleaved, after one warm-up each."""
    times = {name: [] for name in engines}
    for engine in engines.values():
        engine(images)
    for _ in range(rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine(images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            times[name].append(time.perf_counter() - start)
    return min(times, key=lambda name: statistics.median(times[name]))


def build(name: str, model: nn.Module, images: Tensor) -> Engine:
    """The engine of that name for a model in evaluation mode and images of one shape, dtype and device.

    Raises Unavailable with the reason where it cannot run, ValueError for an unknown name.
    """
    if name not in ENGINES:
        raise ValueError(f"engine: name must be one of {', '.join(ENGINES)}, got {name!r}")
    return ENGINES[name](model, images)


def _eager(model: nn.Module, images: Tensor) -> Engine:
    return torch.inference_mode()(model.__call__)


def _own(model: nn.Module) -> nn.Module:
    """A dense model in the modules and operators of this package, nothing pruned: what pruning itself must beat."""
    from .blocks import BlockPruning
    from .surgery import prune

    if hasattr(model, "learning"):
        return model
    try:
        return prune(model, blocks=BlockPruning())
    except (TypeError, ValueError) as error:
        raise Unavailable(str(error)) from None


def _modules(model: nn.Module, images: Tensor) -> Engine:
    return _eager(_own(model), images)


def _packed(model: nn.Module, images: Tensor) -> Engine:
    """`modules` with the weights of dense linear layers laid out beforehand as oneDNN reads them; a second copy of these weights."""
    from .ops.linear import pack

    packed = copy.deepcopy(model) if hasattr(model, "learning") else _own(model)
    layers = [layer for block in packed.blocks for layer in block.modules() if type(layer) is nn.Linear]
    rows: dict[nn.Module, int] = {}
    handles = [layer.register_forward_pre_hook(lambda layer, args: rows.update({layer: args[0].numel() // args[0].shape[-1]}))
               for layer in layers]
    with torch.inference_mode(), unwatched():  # masked layers are not dense, their weights as they are are not read
        packed(images)
    for handle in handles:
        handle.remove()
    for layer, count in rows.items():
        layer.packed = pack(layer.weight, count)
    if not any(getattr(layer, "packed", None) is not None for layer in layers):
        raise Unavailable(f"oneDNN does not serve {images.dtype} on {images.device}")
    return _eager(packed, images)


def _compiled(mode: str) -> Callable[[nn.Module, Tensor], Engine]:
    def make(model: nn.Module, images: Tensor) -> Engine:
        if images.device.type != "cuda" and mode != "default":
            raise Unavailable(f"mode {mode} is for GPUs")
        compiled = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)

        @torch.inference_mode()
        def run(x: Tensor) -> Tensor:
            if mode != "reduce-overhead":
                return compiled(x)
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(x).clone()  # the graph's own output is overwritten by the next call
        return run
    return make


def _cuda_graph(model: nn.Module, images: Tensor) -> Engine:
    if images.device.type != "cuda":
        raise Unavailable(f"CUDA graphs need a GPU, the images are on {images.device}")
    static, stream, graph = images.clone(), torch.cuda.Stream(images.device), torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.device(images.device), for_graph():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(static)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            out = model(static)

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        with torch.cuda.device(static.device):  # replay goes to the current stream of the current device
            static.copy_(x)
            graph.replay()
            return out.clone()
    run.model = model  # the graph keeps addresses of weights, not the weights
    return run


def _needs(*packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise Unavailable(f"{', '.join(missing)} is not installed (pip install 'vitprune[export]')")


def _onnxruntime(model: nn.Module, images: Tensor) -> Engine:
    _needs("onnx", "onnxscript", "onnxruntime")
    if images.device.type != "cpu":
        raise Unavailable(f"onnxruntime is run on the CPU only, the images are on {images.device}")
    if images.dtype != torch.float32:
        raise Unavailable(f"onnxruntime's CPU kernels are run in float32 only, got {images.dtype}")
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "model.onnx", images, dynamic_batch=False)
        session = _session(path)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    return run


def _session(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads that spin slow down whoever runs next
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _openvino(model: nn.Module, images: Tensor) -> Engine:
    _needs("onnx", "onnxscript", "openvino")
    if images.device.type != "cpu":
        raise Unavailable(f"openvino is run on the CPU only, the images are on {images.device}")
    if images.dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable(f"openvino is run in float32 and bfloat16 on a CPU, got {images.dtype}")
    import openvino

    core = openvino.Core()
    if images.dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("openvino has no bfloat16 on this CPU")
    with tempfile.TemporaryDirectory() as folder:
        wide = copy.deepcopy(model).float()
        path = export_onnx(wide, Path(folder) / "model.onnx", images.float(), dynamic_batch=False)
        compiled = core.compile_model(core.read_model(path), "CPU", {  # its own default precision differs by CPU
            "INFERENCE_PRECISION_HINT": "bf16" if images.dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({0: x.float().numpy()})[compiled.outputs[0]].copy()).to(x.dtype)
    return run


def export_onnx(model: nn.Module, path: str | os.PathLike, images: Tensor, dynamic_batch: bool = True) -> Path:
    """Write `model` in evaluation mode as an ONNX file with input `images` and output `logits`; returns its path.

    Operators are exported in their plain PyTorch form, keep counts as constants.
    Raises Unavailable where onnx or onnxscript is missing, ValueError in training mode.
    """
    _needs("onnx", "onnxscript")
    if model.training:
        raise ValueError("export_onnx: model must be in evaluation mode (call model.eval())")
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    if dynamic_batch and images.shape[0] == 1:
        images = torch.cat([images, images])  # a batch of one would be taken for a constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=shapes, input_names=["images"],
                                    output_names=["logits"], verbose=False,
                                    custom_translation_table={torch.ops.aten.sort.stable: _onnx_sort})
    program.save(str(path), external_data=False)
    return Path(path)


def _onnx_sort(values, stable=None, dim: int = -1, descending: bool = False):
    """aten::sort.stable, which torch's exporter lacks, as TopK: in ONNX equal values come in order of their index."""
    from onnxscript import opset18 as op

    return op.TopK(values, op.Constant(value_ints=[int(values.shape[dim])]), axis=dim, largest=int(descending), sorted=1)


def check_onnx(path: str | os.PathLike, model: nn.Module, images: Tensor) -> float:
    """The largest difference between the file's logits, run by ONNX Runtime, and the model's, over the model's largest logit."""
    _needs("onnxruntime")
    with torch.inference_mode():
        expected = model(images)
    got = torch.from_numpy(_session(Path(path)).run(None, {"images": images.numpy()})[0])
    return float((got - expected).abs().max() / expected.abs().max())


ENGINES = {"eager": _eager, "modules": _modules, "packed": _packed, "compiled": _compiled("default"),
           "compiled:max-autotune": _compiled("max-autotune-no-cudagraphs"),
           "compiled:reduce-overhead": _compiled("reduce-overhead"), "cuda_graph": _cuda_graph,
           "modules:cuda_graph": lambda model, images: _cuda_graph(_own(model), images),
           "onnxruntime": _onnxruntime, "openvino": _openvino}
