"""Where pictures come from: an image folder, parquet files, a Hugging Face dataset, or a stream of one; one meaning of labels."""
from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageNetInfo

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
TABLES = ("parquet", "hf", "stream")  # kinds of sources that have columns
SPLITS = ("train", "val", "validation", "test")
SYNONYMS = {"val": ("val", "validation"), "validation": ("validation", "val")}
UNREADABLE = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError, EOFError, LookupError, TypeError,
              ArithmeticError)  # an OverflowError, for one: the offset of a damaged TIFF file


class Source:
    """Pictures in a fixed order. `records(ids)` yields (bytes, label, name) for ascending ids; `len` is their number.

    names: class names in the order of the labels where the source knows them. random: whether ids may come in any order
    without reading what lies between. place: what was opened, equal for the same pictures.
    """
    place: object = None
    names: Sequence[str] | None = None
    random = True

    def __len__(self) -> int:
        raise NotImplementedError

    def records(self, ids: Sequence[int]) -> Iterator[tuple[bytes, int, str]]:
        raise NotImplementedError

    def labels(self) -> list[int]:
        """The label of every picture, without decoding any."""
        raise NotImplementedError


class Folder(Source):
    """One folder of pictures a class; see `class_ids` on what the names mean."""

    def __init__(self, root: str | Path, class_map: dict[str, int] | None = None) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"data: source must be a folder with one folder of pictures a class, got {str(root)!r}")
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
        if not folders:
            raise ValueError(f"data: source must hold one folder a class, found none in {root}")
        ids, self.names = class_ids([p.name for p in folders], class_map, str(root))
        self.files = sorted(((path.relative_to(root).as_posix(), ids[folder.name]) for folder in folders for path in folder.rglob("*")
                             if path.suffix.lower() in EXTENSIONS and path.is_file()
                             and not any(part.startswith(".") for part in path.relative_to(folder).parts)),
                            key=lambda item: (item[1], item[0].split("/", 1)[1]))
        if not self.files:
            raise ValueError(f"data: source must hold pictures ({', '.join(EXTENSIONS)}), found none in {root}")
        self.root, self.place = root, root.resolve()

    def __len__(self) -> int:
        return len(self.files)

    def records(self, ids):
        for i in ids:
            name, label = self.files[i]
            yield _bytes(self.root / name), label, name

    def labels(self):
        return [label for _, label in self.files]


class Table(Source):
    """The columns of a Hugging Face dataset: undecoded pictures and labels."""

    def __init__(self, rows, name: str, class_map=None, image: str | None = None, label: str | None = None) -> None:
        self.rows, self.image, self.label, self.ids, self.names = _columns(rows, name, class_map, image, label)
        self.name = name

    def _id(self, value) -> int:
        label = value if self.ids is None else self.ids.get(value)
        if not isinstance(label, int) or label < 0:
            raise ValueError(f"data: column {self.label} of {self.name} must hold class ids >= 0 or names of classes, got {value!r}")
        return label


class Rows(Table):
    """A Hugging Face dataset with random access: cached, or read from local parquet files."""

    def __len__(self) -> int:
        return len(self.rows)

    def records(self, ids):
        for i in ids:
            row = self.rows[int(i)]
            yield _encoded(row[self.image]), self._id(row[self.label]), f"{self.name}[{i}]"

    def labels(self):
        return [self._id(value) for value in self.rows[self.label]]


class Stream(Table):
    """A Hugging Face dataset that is read from front to back, again every epoch; nothing is stored.

    Its length comes from the dataset's description, or must be given.
    """
    random = False

    def __init__(self, rows, name: str, length: int | None, class_map=None, image: str | None = None, label: str | None = None) -> None:
        super().__init__(rows, name, class_map, image, label)
        if length is None:
            splits = getattr(getattr(rows, "info", None), "splits", None) or {}
            split = splits.get(str(getattr(rows, "split", "")))
            length = split.num_examples if split is not None else None
        if not length:
            raise ValueError(f"data: length must be given for the stream {name}, whose description does not tell the number of pictures")
        self.length = length

    def __len__(self) -> int:
        return self.length

    def records(self, ids):
        wanted = iter(ids)
        target = next(wanted, None)
        read = (row for part in self.rows.iter(64) for row in zip(part[self.image], part[self.label]))  # iter(): no sharding by worker
        for i, (cell, value) in enumerate(read):
            if target is None:
                return
            if i == target:
                yield _encoded(cell), self._id(value), f"{self.name}[{i}]"
                target = next(wanted, None)
        if target is not None:
            raise ValueError(f"data: the stream {self.name} must hold {self.length} pictures, it ended before number {target}")

    def labels(self):
        return [self._id(row[self.label]) for row in self.rows.remove_columns([self.image])]


def open_source(source: str, split: str, *, class_map: str | None = None, length: int | None = None, image: str | None = None,
                label: str | None = None) -> Source:
    """The pictures of one split.

    source: a folder (of splits, or of classes); "parquet:FILE_OR_FOLDER"; "hf:NAME[@CONFIG]" (downloaded and cached);
        "stream:NAME[@CONFIG]" or "stream:parquet:FILE_OR_FOLDER" (read from front to back).
    class_map: JSON file {class name: id} for names that do not tell their id.
    Raises ValueError or FileNotFoundError naming what is missing.
    """
    names = None if class_map is None else read_class_map(class_map)
    kind, _, rest = source.partition(":")
    if length is not None and kind != "stream":
        raise ValueError(f"data: length must be None except for a stream, got {length} for {source!r}")
    if kind not in TABLES:
        return Folder(_split_folder(Path(source), split), names)
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError("data: Hugging Face datasets and parquet files need the package datasets: "
                                  "pip install 'vitprune[train]'") from None
    streaming = kind == "stream"
    if streaming:
        kind, _, rest = rest.partition(":") if rest.startswith("parquet:") else ("hf", "", rest)
    name, _, config = rest.partition("@")
    files = parquet_files(rest, split) if kind == "parquet" else None
    try:
        if files is None:
            rows, split = _load(name, config or None, split, streaming)
        else:
            rows = datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
            if streaming and length is None:
                import pyarrow.parquet
                length = sum(pyarrow.parquet.ParquetFile(f).metadata.num_rows for f in files)
    except Exception as error:  # the network, the hub, a damaged file, an unknown split: the library raises many types
        raise ValueError(f"data: {source!r} must be a dataset with a split {split!r} that can be read, got {type(error).__name__}: "
                         f"{error}") from error
    opened = Stream(rows, rest, length, names, image, label) if streaming else Rows(rows, rest, names, image, label)
    opened.place = files or (rest, split)
    return opened


def _load(name: str, config: str | None, split: str, streaming: bool):
    """(the dataset, the name of the split that it has)"""
    import datasets
    refused = None
    for other in SYNONYMS.get(split, (split,)):
        try:
            return datasets.load_dataset(name, config, split=other, streaming=streaming), other
        except ValueError as error:  # a split that is not there, among others
            refused = refused or error
    raise refused


def _split_folder(folder: Path, split: str) -> Path:
    """The folder of the split, or the folder itself where it holds classes and no splits."""
    for name in SYNONYMS.get(split, (split,)):
        if (folder / name).is_dir():
            return folder / name
    splits = [s for s in SPLITS if (folder / s).is_dir() and any(p.is_dir() for p in (folder / s).iterdir())]
    if splits:
        raise FileNotFoundError(f"data: source must hold the split {split!r}, got {str(folder)!r} with {', '.join(splits)}")
    return folder


def parquet_files(path: str, split: str) -> list[str]:
    """The parquet files of a split: the file itself, or those in a folder whose name begins with the split's."""
    place = Path(path)
    found = [place] if place.is_file() else []
    for name in SYNONYMS.get(split, (split,)):
        found = found or sorted(f for f in place.rglob("*.parquet") if f.name.startswith(name) or f.parent.name == name)
    if not found:
        others = ", ".join(sorted(f.name for f in place.rglob("*.parquet"))[:5])
        raise FileNotFoundError(f"data: source must be a parquet file or a folder with files {split}*.parquet, got {path!r}"
                                + (f" with {others}" if others else ""))
    return [str(f) for f in found]


def read_class_map(path: str | Path) -> dict[str, int]:
    """The JSON object {class name: id} of a file."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"data: class_map must be a JSON file {{class name: id}}, got {str(path)!r}: {error}") from None
    bad = found if not isinstance(found, dict) else {k: v for k, v in found.items() if type(v) is not int or v < 0}
    if bad or not found:
        raise ValueError(f"data: class_map must be a JSON file {{class name: id >= 0}}, got {str(bad)[:80]} in {str(path)!r}")
    return found


def class_ids(names: Sequence[str], class_map: dict[str, int] | None, where: str) -> tuple[dict[str, int], list[str] | None]:
    """Class id by name, and the names of all classes in the order of their ids (None where they are not known).

    `class_map` decides where given. Integers mean themselves: their lexical order ("0", "1", "10", ...) would scramble
    the labels. WordNet ids of ImageNet-1k mean its class ids. Any other names are numbered in their lexical order.
    """
    if class_map is not None:
        missing = [name for name in names if name not in class_map]
        if missing:
            raise ValueError(f"data: class_map must name every class of {where}, lacks {missing[0]!r}")
        return {name: class_map[name] for name in names}, None
    if all(re.fullmatch(r"\d+", name) for name in names):
        ids = {name: int(name) for name in names}
        if len(set(ids.values())) != len(ids):
            raise ValueError(f"data: classes of {where} must differ as numbers, got {sorted(names)[:4]}")
        return ids, None
    imagenet = {name: index for index, name in enumerate(_wordnet())}
    known = [name in imagenet for name in names]
    if all(known):
        return {name: imagenet[name] for name in names}, list(imagenet)
    if any(known) or any(re.fullmatch(r"\d+", name) for name in names):
        odd = next(n for n, k in zip(names, known) if not k) if any(known) else next(n for n in names if not n.isdigit())
        raise ValueError(f"data: classes of {where} must be all WordNet ids of ImageNet-1k, all numbers, or all names; {odd!r} is of "
                         "another kind than the others (a class_map file settles it)")
    ordered = sorted(names)
    return {name: index for index, name in enumerate(ordered)}, ordered


def _wordnet() -> list[str]:
    """The WordNet ids of ImageNet-1k in the order of its classes."""
    return ImageNetInfo("imagenet-1k").label_names()


def _columns(rows, name: str, class_map, image: str | None, label: str | None):
    """The dataset with undecoded pictures, its two columns, the id of each label (None: itself), and class names."""
    import datasets

    features = rows.features or {}
    pictures = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    image = image or next((key for key in (*pictures, "image", "img") if key in features), None)
    label = label or next((key for key in (*classes, "label", "labels", "fine_label") if key in features), None)
    for what, key in (("image", image), ("label", label)):
        if key not in features:
            raise ValueError(f"data: {what}_key must be a column of {name} ({', '.join(features) or 'none is known'}), got {key!r}")
    feature = features[label]
    rows = rows.cast_column(image, datasets.Image(decode=False))
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        if class_map is None and not all(name.isdecimal() for name in names) and not set(names) <= set(_wordnet()):
            return rows, image, label, None, names
        ids, ordered = class_ids(names, class_map, name)  # numbers and WordNet ids mean the same as in a folder, whatever their order
        return rows, image, label, {index: ids[n] for index, n in enumerate(names)}, ordered
    kind = str(getattr(feature, "dtype", feature))
    if kind.startswith(("int", "uint")):
        return rows, image, label, None, None
    if "string" not in kind:
        raise ValueError(f"data: label_key must be a column of class ids or names, got {label!r} of {kind}")
    if class_map is None and isinstance(rows, datasets.IterableDataset):
        raise ValueError(f"data: class_map must be given for the stream {name}, whose labels are text")
    ids, ordered = class_ids(list(class_map or sorted(set(rows[label]))), class_map, name)
    return rows, image, label, ids, ordered


def _encoded(cell) -> bytes:
    if cell is None:
        return b""
    return cell["bytes"] if cell.get("bytes") is not None else _bytes(cell.get("path"))


def _bytes(path) -> bytes:
    """The file's content; nothing, which is an unreadable picture, where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, TypeError):
        return b""


def decode(data: bytes) -> Image.Image:
    """An RGB picture, upright as its EXIF data says, transparency on white; raises one of UNREADABLE for what is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = Image.open(io.BytesIO(data))
        picture.load()
        with contextlib.suppress(Exception):  # damaged EXIF data say nothing of the pixels, and raise what they like
            picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("I;16", "I;16B", "I;16L", "I"):
            wide = np.asarray(picture, dtype=np.float32)
            picture = Image.fromarray((wide / 257).clip(0, 255).round().astype(np.uint8))
        if picture.mode in ("RGBA", "LA", "PA") or (picture.mode == "P" and "transparency" in picture.info):
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
