"""The page as a browser reads it: whole, self-contained, and with the names of files as text."""

import base64
import io
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from torch import nn

from autohdr import evaluate as evaluation
from autohdr.data.pairs import Pair
from autohdr.evaluate import evaluate
from autohdr.report import page

NAMES = [
    "a.png",
    "<img src=x onerror=alert(1)>.png",
    "\"quoted\" & 'quoted'.png",
    "a</h2><script>alert(1)<.png",  # in a folder "a<"
    "--><!--.png",
    "$title ${script} $$.png",
    "line\nbreak.png",
    os.fsdecode(b"caf\xe9 \xff.png"),
]
VOID = {"meta", "link", "img", "input"}


class Page(HTMLParser):
    """What a page consists of. Every element must be closed by the tag that it was opened by, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.elements, self.inside, self.texts = text, [], [], {}
        self.feed(text)
        self.close()
        assert not self.inside

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.inside.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside[-1]][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def pairs(tmp_path):
    """A pair for each name, 40 x 24 pixels."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        photo = tmp_path / name
        photo.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 120, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photo)
        Image.fromarray(pixels * 2).save(tmp_path / f"{number}_tar.png")
    return [Pair(tmp_path / name, tmp_path / f"{number}_tar.png") for number, name in enumerate(NAMES)]


def written(pairs, out, model=None) -> Page:
    evaluate(pairs, out, model=model)
    return Page((out / "report.html").read_text("utf-8"))


def test_page_holds_all_that_it_needs(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_PICTURE_SIDE", 20)
    made = written(pairs, tmp_path / "out", nn.Identity())
    assert not any(word in made.text for word in ("http:", "https:", "url(", "@import"))
    urls = [value for _, attributes in made.elements for key, value in attributes.items() if key in ("src", "href")]
    assert all(url.startswith("data:") for url in urls) and len(urls) == 5 * len(NAMES) + 1
    assert [image["data-show"] for image in made.all("img")] == [
        "source",
        "gain_and_gamma",
        "auto_tone",
        "model",
        "target",
    ] * len(NAMES)
    assert [image["class"] for image in made.all("img")] == ["left", "", "", "right", ""] * len(NAMES)
    for image in made.all("img")[:5]:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as picture:
            assert picture.format == "JPEG" and picture.size == (20, 12)
    (style,), (script,) = made.texts["style"], made.texts["script"]
    assert ".compare" in style and "querySelectorAll" in script


@pytest.mark.parametrize("model", [None, nn.Identity()], ids=["baselines", "model"])
def test_names_of_files_are_text(pairs, tmp_path, model):
    made = written(pairs, tmp_path / "out", model)
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in NAMES]
    assert made.texts["h2"] == shown and shown[-1] == r"caf\udce9 \udcff.png"
    labels = ["unedited", "gain and gamma", "auto-tone", *(["Identity"] if model else []), "target"]
    assert [image["alt"] for image in made.all("img")] == [f"{label} of {name}" for name in shown for label in labels]
    assert [input_["aria-label"] for input_ in made.all("input")] == [f"where the left picture of {name} ends" for name in shown]
    assert len(made.all("script")) == 1


def test_name_of_a_model_is_text(pairs, tmp_path):
    model = type("</title><b>", (nn.Identity,), {})()
    made = written(pairs[:1], tmp_path / "out", model)
    assert made.texts["title"] == made.texts["h1"] == ["</title><b> against auto-tone"]
    assert made.texts["b"] == ["unedited", "</title><b>"] and made.texts["button"][3] == "</title><b>"


def test_page_shows_the_first_pairs_of_many(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SHOWN_PAIRS", 2)
    made = written(pairs, tmp_path / "out")
    assert made.texts["h2"] == NAMES[:2] and f"The first 2 of {len(NAMES)} pairs" in made.text
