"""Which backend measured fastest on this card: a file per card, shipped in kernels/configs/ or written by `vitprune tune`.

The name says the card; that of a user's file the versions of torch, Triton and vitprune too, which it holds for alone. Inside: "card",
"versions", "machine", "choices" [{"op", "dtype", "facts", "backend"}], "disabled" [{"op", "dtype", "backend", "reason"}], "configs",
a table as in kernels/configs/, and in a user's file "measured", the times. A GPU without a file takes the choices shipped for one of
its compute capability, else the order of the operators' own tables.
"""
import functools
import json
import platform
import re
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from .. import nvrtc
from ..kernels import configs

FIELDS = {"card": str, "versions": dict, "choices": list, "disabled": list, "configs": dict, "measured": list}
ROWS = {"choices": {"op": str, "dtype": str, "facts": dict, "backend": str},
        "disabled": {"op": str, "dtype": str, "backend": str, "reason": str}, "measured": {"op": str, "dtype": str, "facts": dict}}


@dataclass(frozen=True)
class Dispatch:
    """What was measured on a card; empty where nothing was."""
    path: Path | None = None
    data: dict = field(default_factory=lambda: {"choices": [], "disabled": [], "configs": {}})

    def winner(self, op: str, dtype: torch.dtype, facts: dict) -> str | None:
        """The backend measured fastest, None where that was not measured."""
        wanted = {"op": op, **key(dtype, facts)}
        return next((row["backend"] for row in self.data["choices"] if wanted.items() <= row.items()), None)

    def disabled(self, op: str, dtype: torch.dtype) -> dict[str, str]:
        """Backends that failed their check on this card, with the reason."""
        kind = key(dtype, {})["dtype"]
        return {row["backend"]: f"failed its check on this card: {row['reason']}"
                for row in self.data["disabled"] if (row["op"], row["dtype"]) == (op, kind)}


def key(dtype: torch.dtype, facts: dict) -> dict:
    """What a choice depends on, as it stands in a file. Dtypes beside the first change what can run, hardly what is fast."""
    return {"dtype": str(dtype).removeprefix("torch."), "facts": {k: v for k, v in facts.items() if not isinstance(v, torch.dtype)}}


def describe(choice: dict) -> str:
    """The dtype and the facts that hold, in words: "float16 large"; and the dtype that was timed where it was another."""
    return " ".join([choice["dtype"], *(name if value is True else f"{name} {value}" for name, value in choice["facts"].items() if value),
                     *([f"(timed in {choice['timed_in']})"] if "timed_in" in choice else [])])


@functools.cache
def of(device: torch.device) -> Dispatch:
    """What was measured on that device's card with these versions. A file that cannot be read is a warning, not an error."""
    name, alike = card(device), _alike(device)
    for path in (path_of(name), configs.FOLDER / f"{slug(name)}.json", *alike) if name else ():
        try:
            data = read(path, None if path in alike else name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is ignored: {error}; `vitprune tune` writes it anew", stacklevel=2)
            continue
        if data["configs"]:
            configs.use(configs.capability(device), data["configs"])
        return Dispatch(path, data)
    return Dispatch()


def _alike(device: torch.device) -> list[Path]:
    """Files shipped for other cards of that one's compute capability."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return []
    own = list(torch.cuda.get_device_capability(device))
    return [path for path in sorted(configs.FOLDER.glob("*.json"))
            if json.loads(path.read_text()).get("machine", {}).get("capability") == own]


def read(path: Path, name: str | None) -> dict:
    """The contents of a file for that card, or for any. Raises OSError or ValueError."""
    try:
        return check(json.loads(path.read_text()), name)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check(data: object, name: str | None) -> dict:
    """The contents of a file as they must be for that card, or for any. Raises ValueError naming the field that is wrong."""
    if not isinstance(data, dict):
        raise ValueError("it must hold a JSON object")
    data = {"measured": [], **data}  # shipped files leave it out
    for field_, kind in FIELDS.items():
        if not isinstance(data.get(field_), kind):
            raise ValueError(f"{field_} must be a {kind.__name__}, got {data.get(field_)!r:.60}")
    for field_, columns in ROWS.items():
        for row in data[field_]:
            for column, kind in columns.items():
                if not isinstance(row, dict) or not isinstance(row.get(column), kind):
                    raise ValueError(f"{field_} must hold objects with {column} ({kind.__name__}), got {row!r:.60}")
    if data["card"] != (name or data["card"]):
        raise ValueError(f"card must be {name}, got {data['card']}")
    configs.check(data["configs"])
    return data


def keep(earlier: dict, data: dict) -> list[str]:
    """Add to `data` what an earlier file of the same card and versions has beyond it; returns the operators and dtypes of that.

    Choices stay where their case was not measured again, disabled backends where their operator was not in that dtype, launch
    configurations until they are tuned again."""
    def case(row: dict) -> tuple:
        return row["op"], row["dtype"], str(row.get("facts"))
    cases, kept = {case(row) for row in data["choices"]}, set()
    kinds = {case(row)[:2] for rows in (data["choices"], data["disabled"]) for row in rows}
    for field_ in ROWS:
        rows = [row for row in earlier[field_] if (case(row)[:2] not in kinds if field_ == "disabled" else case(row) not in cases)]
        data[field_] += rows
        kept |= {f"{row['op']} {row['dtype']}" for row in rows}
    for op, tuned in earlier["configs"].items():
        again = data["configs"].get(op, {})
        data["configs"][op] = {**tuned, **again}
        kept |= {f"{op} {kind}" for kind in tuned.keys() - again.keys()}
    return sorted(kept)


@functools.cache
def card(device: torch.device) -> str | None:
    """The GPU's or the CPU's name, None where there is none to know."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else None  # graphs can be traced for cards that are not here
    return (cpu("model name") or platform.processor() or None) if device.type == "cpu" else None


def cpu(fact: str) -> str | None:
    """A line of /proc/cpuinfo, None where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(fact)), None)


@functools.cache
def versions() -> dict[str, str]:
    """What a measurement holds for: minor versions of torch and Triton, and this package's."""
    def of_package(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "none"
    minor = lambda version: ".".join(version.split("+")[0].split(".")[:2])  # noqa: E731
    return {"torch": minor(torch.__version__), "triton": minor(of_package("triton")), "vitprune": of_package("vitprune")}


def path_of(name: str) -> Path:
    """The user's file for that card."""
    file = f"{slug(name)}.torch{versions()['torch']}.triton{versions()['triton']}.json"
    return nvrtc.cache_folder() / "dispatch" / versions()["vitprune"] / file


def slug(name: str) -> str:
    """A card's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
