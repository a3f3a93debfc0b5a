"""What of vitprune can run on this machine, and what to install where something cannot."""
import contextlib
import json as jsonlib
import os
import platform
import re
import shutil
import subprocess
import warnings
from dataclasses import asdict, dataclass, replace
from importlib import metadata, util

import torch

from . import native, nvrtc, ops  # noqa: F401 (ops fills the tables)
from .ops import dispatch, registry

ORDER = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class GPU:
    """One card: its name and compute capability."""
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """Every fact about devices that the report judges; tests build their own."""
    torch_version: str
    cuda_build: str | None            # CUDA version torch is built for; None: a build without CUDA
    arch_list: tuple[str, ...]        # ("sm_75", ..., "compute_120")
    gpus: tuple[GPU, ...]             # cards torch can use
    driver: str | None                # NVIDIA driver's version, "550.54.14"
    driver_cuda: tuple[int, int]      # the newest CUDA the driver supports; (0, 0): unknown
    cards: tuple[GPU, ...] = ()       # cards the driver reports, usable from torch or not


def this_machine() -> Machine:
    """The facts of the machine this runs on."""
    gpus = ()
    if torch.version.cuda and torch.cuda.is_available():
        gpus = tuple(GPU(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
                     for i in range(torch.cuda.device_count()))
    driver, cards = _nvidia_smi()
    version = native.driver_version()
    return Machine(torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()) if torch.version.cuda else (),
                   gpus, driver, (version // 1000, version % 1000 // 10), cards)


def _nvidia_smi() -> tuple[str | None, tuple[GPU, ...]]:
    """The driver's version and its cards, whatever torch is installed."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap,name", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        rows = [[field.strip() for field in line.split(",", 2)] for line in lines]
        cards = tuple(GPU(name, tuple(int(n) for n in capability.split("."))) for _, capability, name in rows)
        return (rows[0][0] if rows else None), cards
    return None, ()


def problems(machine: Machine) -> list[str]:
    """Combinations of card, driver and torch that cannot work, each with what to install instead."""
    found = []
    if machine.cards and machine.cuda_build is None:
        names = ", ".join(card.name for card in machine.cards)
        found.append(f"torch {machine.torch_version} is built without CUDA and cannot use {names}: install a CUDA build "
                     f"({ORDER})")
        return found
    if machine.cuda_build is None:
        return found
    build = tuple(int(n) for n in machine.cuda_build.split(".")[:2])
    # Within a major version a newer torch runs on an older driver; across majors it does not.
    if machine.driver_cuda != (0, 0) and machine.driver_cuda[0] < build[0]:
        cuda = ".".join(map(str, machine.driver_cuda))
        found.append(f"driver {machine.driver or '(unknown)'} supports CUDA {cuda}, and torch {machine.torch_version} needs "
                     f"CUDA {machine.cuda_build}: update the NVIDIA driver, or install a torch built for CUDA {cuda} or older "
                     f"({ORDER})")
    for card in machine.gpus or machine.cards:
        if not _serves(machine.arch_list, card.capability):
            found.append(_no_code(machine, card))
    return found


def _serves(arch_list: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Machine code of the same major and no higher minor (a Jetson's of its own alone), or PTX of any card as old or older."""
    major, minor = capability
    for entry in arch_list:
        kind, _, number = entry.partition("_")
        if number.rstrip("af") != number:  # sm_90a: for that card alone
            if number.rstrip("af") == f"{major}{minor}":
                return True
            continue
        have = divmod(int(number), 10)
        alike = have == capability or native.JETSONS.isdisjoint((have, capability))
        if (kind == "sm" and have[0] == major and have[1] <= minor and alike) or (kind == "compute" and have <= capability):
            return True
    return False


def _no_code(machine: Machine, card: GPU) -> str:
    number = ".".join(map(str, card.capability))
    head = f"torch {machine.torch_version} has no code for {card.name} (compute capability {number})"
    if card.capability < (5, 0):
        return f"{head}, and no torch that vitprune supports has: use the CPU (CUDA_VISIBLE_DEVICES=)"
    if card.capability < (7, 5):  # CUDA 13 dropped Maxwell, Pascal and Volta
        return f"{head}: install torch 2.14 or older (torch<2.15) in its CUDA 12.6 build ({ORDER})"
    return f"{head}: install a newer torch ({ORDER})"


def default_device(machine: Machine | None = None) -> str:
    """cuda where the first GPU is usable, else cpu; one that is there and cannot be used is a warning that says why."""
    machine = machine or this_machine()
    found = problems(replace(machine, gpus=machine.gpus[:1], cards=machine.cards[:1]))
    if found:
        warnings.warn(f"running on the CPU: {found[0]}", stacklevel=2)
    return "cuda" if machine.gpus and not found else "cpu"


def choose_device(name: str | None, what: str) -> str:
    """`name` ("cpu", "cuda" or "cuda:1") where this machine has it; None: `default_device`.

    Raises ValueError, or RuntimeError where there is no such GPU, in the name of `what`.
    """
    if name is None:
        return default_device()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"{what}: device must be cpu or cuda, got {name!r}")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"{what}: device must be one this machine has, got {name!r} ({torch.cuda.device_count()} GPUs are usable; "
                           "see `vitprune doctor`)")
    return name


def backends(device: torch.device) -> dict[str, dict[str, str | None]]:
    """For each operator its backends in order of choice, with the reason for each refusal (None: it can run)."""
    return {op: registry.table(op, device) for op in sorted(registry.TABLES)}


def measured(device: torch.device) -> dict:
    """What `vitprune tune` found here, or for the package on this card or one of its compute capability: its file, choices and
    disabled backends."""
    found = dispatch.of(device)
    return {"card": dispatch.card(device), "file": found.path and str(found.path), "choices": found.data["choices"],
            "disabled": found.data["disabled"]}


def report(machine: Machine | None = None) -> dict:
    """Everything `vitprune doctor` prints, as plain data. Raises ValueError for a VITPRUNE_CUDA_ARCH that is none."""
    machine = machine or this_machine()
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    library = nvrtc.library()
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = [*(f"{home}/bin" for home in homes), None, "/usr/local/cuda/bin"]  # where the build looks, None: the PATH
    return {
        "vitprune": metadata.version("vitprune"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "machine": asdict(machine),
        "packages": {name: _version(name) for name in ("timm", "triton", "onnxruntime", "openvino")},
        "compilers": {
            "c++": next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None),
            "nvcc": next(filter(None, (shutil.which("nvcc", path=path) for path in nvcc)), None),
            "nvrtc": ".".join(map(str, nvrtc.version())) if library else None,
        },
        "extension": native.reason_cpp(torch.device("cpu")) or "installed",
        "cubins": native.cubins(),
        "forced": native.forced(),
        "backends": {str(device): backends(device) for device in devices},
        "measured": {str(device): measured(device) for device in devices},
        "problems": problems(machine),
    }


def _version(package: str) -> str | None:
    if util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # onnxruntime-gpu, pytorch-triton; or a mere folder of that name
        return next(map(metadata.version, metadata.packages_distributions().get(package, ())), None)


def text(facts: dict) -> str:
    """The report for people."""
    machine, compilers = facts["machine"], facts["compilers"]
    cards = machine["gpus"] or machine["cards"]
    gpus = [f"{gpu['name']} (compute capability {gpu['capability'][0]}.{gpu['capability'][1]})" for gpu in cards]
    newest = ".".join(map(str, machine["driver_cuda"]))
    lines = [
        f"vitprune   {facts['vitprune']}, Python {facts['python']}, {facts['system']}",
        f"torch      {machine['torch_version']}, " + (
            f"CUDA {machine['cuda_build']}, code for {' '.join(machine['arch_list']) or 'no card (none is usable)'}"
            if machine["cuda_build"] else "no CUDA"),
        f"GPU        {', '.join(gpus) or 'none'}",
        f"driver     {machine['driver'] or 'none'}" + ("" if newest == "0.0" else f", CUDA up to {newest}"),
        "compilers  " + ", ".join(f"{name}: {value or 'none'}" for name, value in compilers.items()),
        "packages   " + ", ".join(f"{name} {value or 'not installed'}" for name, value in facts["packages"].items()),
        f"extension  {facts['extension']}",
        "cubins     " + ("; ".join(f"{op}: {' '.join(archs)}" for op, archs in facts["cubins"].items()) or "none"),
    ]
    lines += [f"forced     CUDA kernels of {facts['forced'] / 10} (VITPRUNE_CUDA_ARCH)"] if facts["forced"] else []
    for device, table in facts["backends"].items():
        found = facts["measured"][device]
        lines += ["", f"backends on {device}, in order of choice " + (f"where {found['file']} says nothing else" if found["file"] else
                                                                      "(not measured on this card: run `vitprune tune`)")]
        for op, entries in table.items():
            usable = [name for name, reason in entries.items() if reason is None]
            lines.append(f"  {op:17} {', '.join(usable)}")
            chosen: dict[str, list[str]] = {}
            for choice in found["choices"]:
                if choice["op"] == op:
                    chosen.setdefault(choice["backend"], []).append(dispatch.describe(choice))
            lines += [f"  {'':17} measured: {name} for {', '.join(cases)}" for name, cases in chosen.items()]
            lines += [f"  {'':17} not {row['backend']} for {row['dtype']}: failed its check on this card: {row['reason']}"
                      for row in found["disabled"] if row["op"] == op and row["dtype"] != "float32"]  # which the table below is for
            lines += [f"  {'':17} not {name}: {reason}" for name, reason in entries.items() if reason]
    lines += ["", "problems", *(f"  - {problem}" for problem in facts["problems"])] if facts["problems"] else []
    return "\n".join(lines)


def main(json: bool = False) -> None:
    """Print what of vitprune can run here and what to install instead; json: one JSON document."""
    facts = report()
    print(jsonlib.dumps(facts, indent=2) if json else text(facts))
