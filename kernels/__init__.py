"""Triton kernels: one file per operator. They know tensors, no models, no autograd."""
import importlib.util

import torch


def reason(device: torch.device) -> str | None:
    """Why Triton cannot serve that device, or None. Importing a kernel's file needs Triton; this does not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (CUDA builds of torch for Linux bring it)"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"Triton needs compute capability 7.0, this card has {major}.{minor}" if major < 7 else None
    import triton
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"Triton runs on a GPU, not on {device.type} (TRITON_INTERPRET=1 interprets it, slowly)"


def ceil_div(n: int, size: int) -> int:
    """n / size rounded up. Triton's own takes microseconds where it is called on the host: more than a launch's other sizes together."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The power of two from n on, 1 at least."""
    return 1 << max(n - 1, 0).bit_length()
