"""The page for a browser. page.html and pair.html are its templates; its style, script and pictures are written into it, so that
it is one file which needs no other.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image
from torch import Tensor

from autohdr.files import write_text
from autohdr.report import tables

SHOWN_PAIRS = 24  # a page with the pictures of hundreds of pairs would not open
_PICTURE_SIDE = 1280


def write_page(path: Path, results: dict[str, Any], pictures: Sequence[Mapping[str, str]]) -> None:
    """Writes the page of what `evaluate` returns. pictures: of the first images of results, as encode_pictures gives them."""
    model = results["model"]["name"] if results["model"] else None
    costs = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in tables.model_costs(results).items())
    shown, count = len(pictures), len(results["images"])
    title = f"{model} against auto-tone" if model else "Auto-tone against the unedited source"
    body = filled(
        "page.html",
        text={
            "title": title,
            "setting": tables.setting(results),
            "origin": tables.origin(results),
            "verdict": tables.verdict(results),
            "caution": tables.caution(results),
            "versions": f"autohdr {results['environment']['autohdr']}, torch {results['environment']['torch']}",
        },
        markup={
            "table": table(tables.titles(results["summary"]["source"]), tables.summary_rows(results)),
            "costs": f"<dl>{costs}</dl>" if costs else "",
            "shown": "" if shown == count else f"<p>The first {shown} of {count} pairs; results.json has the figures of all.</p>",
            "pairs": "".join(_pair(results, *item) for item in zip(results["images"], pictures, strict=False)),
        },
    )
    write_text(path, document(title, body, style="", script="page.js"))


def document(title: str, body: str, style: str, script: str, connect: str = "'none'") -> str:
    """A page that needs no other file. style: what it has beside page.css, a file of this folder, as script is; empty for
    nothing. connect: from where the script may fetch, as a Content-Security-Policy has it."""
    styles = "".join(map(read_part, filter(None, ("page.css", style))))
    return filled(
        "document.html", {"title": title}, {"connect": connect, "style": styles, "body": body, "script": read_part(script)}
    )


def encode_pictures(images: Mapping[str, Tensor]) -> dict[str, str]:
    """{method: (1, 3, H, W) image in [0, 1]} -> {method: the image as the data URI of a JPEG of at most 1280 pixels a side}."""
    return {method: data_uri(_picture(image)) for method, image in images.items()}


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def data_uri(picture: Image.Image) -> str:
    """The data URI of a picture as a JPEG of at most 1280 pixels a side; the picture itself is reduced to them."""
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pair(results: dict[str, Any], image: dict[str, Any], pictures: Mapping[str, str]) -> str:
    labels = {method: tables.label(results, method) for method in pictures}
    right = "model" if "model" in pictures else "auto_tone"
    return pair(image, pictures, labels, right, image_table(labels, image["figures"]))


def image_table(labels: Mapping[str, str], figures: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of one image, {method: {metric: value}}."""
    return table(tables.titles(figures["source"]), tables.image_rows(labels, figures))


def pair(image: dict[str, Any], pictures: Mapping[str, str], labels: Mapping[str, str], right: str, figures: str) -> str:
    """One pair: its pictures on top of one another, the buttons that choose two of them, and its figures' table.

    image: what was found of it; pictures: as encode_pictures gives them; labels: what the reader calls each; right: what is shown
    beside the source at first.
    """
    shown = {"left": "source", "right": right}
    layers = [
        f'<img class="{" ".join(side for side in shown if shown[side] == method)}" data-show="{escape(method)}" '
        f'alt="{escape(labels[method])} of {escape(image["name"])}" draggable=false src="{uri}">'
        for method, uri in pictures.items()
    ]
    return filled(
        "pair.html",
        text={
            "name": image["name"],
            "size": f"{image['width']} × {image['height']}",
            "trained_on": ", trained on" if image.get("trained_on") else "",
            "ratio": f"{image['width'] / image['height']:.4f}",
        }
        | {side: labels[method] for side, method in shown.items()},
        markup={
            "layers": "\n".join(layers),
            "choices": "".join(_choice(side, chosen, labels) for side, chosen in shown.items()),
            "table": figures,
        },
    )


def _choice(side: str, chosen: str, labels: Mapping[str, str]) -> str:
    """The buttons that choose the picture of one side."""
    buttons = "".join(
        f'<button data-side={side} data-show="{escape(method)}" aria-pressed={"true" if method == chosen else "false"}>'
        f"{escape(label)}</button>"
        for method, label in labels.items()
    )
    return f'<div role=group aria-label="{side} picture"><span>{side}</span>{buttons}</div>'


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, each with its label first, below titles of the other columns."""
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in titles)
    body = "".join(f"<tr><th scope=row>{escape(label)}</th>{''.join(map(_cell, cells))}</tr>" for label, *cells in rows)
    return f"<div class=scroll><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(figure: str) -> str:
    """A narrow screen breaks the line before ±, never behind it."""
    return f"<td>{escape(figure).replace('± ', '±&nbsp;')}</td>"


def filled(template: str, text: Mapping[str, str], markup: Mapping[str, str]) -> str:
    """A template of this folder, filled: `text` is escaped, as it may hold names of files; `markup` is put in as it is."""
    return Template(read_part(template)).substitute(markup, **{name: escape(value) for name, value in text.items()})


def read_part(name: str) -> str:
    """What a page is made of: a template, style or script of this folder."""
    return Path(__file__).with_name(name).read_text("utf-8")
