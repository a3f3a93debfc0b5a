"""Pictures that tests write and loaders read."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

SMALL = dict(image_size=16, resize=20, workers=0)


def picture(seed, size=(24, 30), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def folder(root, classes, each=3):
    """A picture tree; its pictures in the order in which it is read."""
    rows = []
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(each):
            data = encoded(picture(100 * c + k))
            (root / name / f"{k}.png").write_bytes(data)
            rows.append((data, name))
    return rows


def table(path, cells, labels, label):
    """A parquet file of pictures as they are, damaged or missing ones among them."""
    datasets = pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    schema = datasets.Features({"image": datasets.Image(), "label": label}).arrow_schema
    parquet.write_table(arrow.table({"image": cells, "label": labels}, schema=schema), path)
    return str(path)


def collect(loader):
    return [(images.clone(), labels.tolist()) for images, labels in loader]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) and i == j for (x, i), (y, j) in zip(a, b))
