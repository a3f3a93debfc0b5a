"""One self-contained HTML report of a demo run: plots, kept patches, tables; no external reference."""
from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}svg,img{max-width:100%;height:auto}.note{color:#666;font-size:.9em}"""


def pyplot():
    """matplotlib's pyplot, drawing into memory; raises ModuleNotFoundError naming the extra that brings it."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("report: plots come with matplotlib, which is missing: "
                                  "pip install 'vitprune[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def _svg(figure) -> str:
    """The figure as an inline <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)


def _png(figure) -> str:
    """The figure as an <img> element that carries its own data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)
    return f'<img alt="kept patches" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def scatter(points: Sequence[tuple[str, float, float]], xlabel: str, ylabel: str) -> str:
    """Labelled points (name, x, y) as inline SVG."""
    figure, axes = pyplot().subplots(figsize=(7, 4))
    for name, x, y in points:
        axes.plot(x, y, "s" if "random" in name else "o", color="tab:gray" if "random" in name else "tab:blue")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=9)
    axes.margins(0.2)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return _svg(figure)


def curve(x: Sequence[float], y: Sequence[float], xlabel: str, ylabel: str) -> str:
    """A line as inline SVG."""
    figure, axes = pyplot().subplots(figsize=(7, 2.5))
    axes.plot(x, y, marker=".")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return _svg(figure)


def units(live: Tensor, ylabel: str, xlabel: str) -> str:
    """A map [rows, units] of what is live (1) and what is not (0), as inline SVG."""
    figure, axes = pyplot().subplots(figsize=(7, 0.3 * len(live) + 1))
    axes.imshow(live.numpy(), cmap="Blues", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
    axes.set_xlabel(f"{xlabel}: {int(live.sum())} live")
    axes.set_ylabel(ylabel)
    return _svg(figure)


def dim_dropped(images: Tensor, kept: Tensor, patch: int) -> Tensor:
    """Images [B, C, H, W] in [0, 1] with the patches that `kept` [B, K] (-1: padding) does not name faded to near white."""
    batch, _, height, width = images.shape
    rows, columns = height // patch, width // patch
    mask = torch.zeros(batch, rows * columns + 1)  # the last column takes the padding
    mask.scatter_(1, kept.cpu() % (rows * columns + 1), 1.0)
    mask = mask[:, :-1].view(batch, 1, rows, columns)
    mask = mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)  # [B, 1, H, W]
    return images * mask + (0.2 * images + 0.8) * (1 - mask)


def patches(images: Tensor, stages: Sequence[Tensor], patch: int) -> str:
    """A row a picture: the picture [B, C, H, W] in [0, 1], then what each stage kept (ids [B, K_s]), as inline PNG."""
    columns = [images, *(dim_dropped(images, kept, patch) for kept in stages)]
    figure, axes = pyplot().subplots(len(images), len(columns), squeeze=False,
                                     figsize=(1.2 * len(columns), 1.2 * len(images)))
    for column, pictures in enumerate(columns):
        for row, picture in enumerate(pictures):
            axes[row][column].imshow(picture.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axes[row][column].axis("off")
        title = "picture" if column == 0 else f"stage {column}: {stages[column - 1].shape[1]}"
        axes[0][column].set_title(title, fontsize=8)
    return _png(figure)


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """Rows as an HTML table; `columns` maps a key to its heading; floats print with two digits, None as a dash."""
    def cell(value) -> str:
        if value is None:
            return "–"
        return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(row.get(key)))}</td>" for key in columns) + "</tr>"
                   for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole HTML page of (heading, HTML) sections."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}</title>"
            f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>")


def write(path: str | Path, text: str) -> None:
    """Writes the report; raises OSError naming the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
