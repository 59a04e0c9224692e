"""Runs of enhance over many photos: what a rerun does, what a kill leaves, shards, and how stages overlap."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import ExifTags, Image
from torch import nn

from autohdr.data.synthetic import render_scene
from autohdr.data.synthetic.pixels import encode
from autohdr.enhance import Interrupted, enhance
from autohdr.enhance import batch as batch_module
from autohdr.enhance import progress as progress_module
from autohdr.enhance.manifest import Manifest, Record
from autohdr.enhance.overlap import overlap
from autohdr.errors import UserError
from autohdr.models import load_checkpoint


class Invert(nn.Module):
    def forward(self, x):
        return 1 - x


class Calls(nn.Module):
    """x; calls `do` with the number of each call."""

    def __init__(self, do):
        super().__init__()
        self.do, self.count = do, 0

    def forward(self, x):
        self.count += 1
        self.do(self.count)
        return x


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (value, 99, 199)).save(path)


def run(folder, model=None, **options):
    return enhance([folder / "in"], folder / "out", model, progress=False, **options)


def counts(result):
    return tuple(result.counts().values())


def lines(folder):
    """{result: its line} of the manifests in a folder, of which none may have two lines."""
    found = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_bytes().splitlines()]
    by_result = {line["result"] or line["source"]: line for line in found}
    assert len(by_result) == len(found)
    return by_result


@pytest.fixture
def photos(tmp_path):
    for index, name in enumerate(("a.png", "b.png", "sub/c.png")):
        save(tmp_path / "in" / name, 60 * index)
    return tmp_path


def test_a_rerun_does_the_rest(photos):
    """What failed is tried again; what was done stays as it is."""
    (photos / "in/b.png").write_text("no photo")
    (photos / "in/d.psd").write_text("none either")
    first = run(photos)
    assert counts(first) == (0, 2, 1, 1)
    found = lines(photos / "out")
    assert [line["status"] for line in found.values()] == ["skipped", "written", "failed", "written"]
    assert found["b.png"]["reason"] == first.failed[0][1] and found["b.png"]["source"] == str(photos / "in/b.png")
    assert found["a.png"]["model"] == {"name": "auto-tone"} and found["a.png"]["options"]["strength"] == 1
    assert found["a.png"]["seconds"] > 0 and found["a.png"]["megapixels"] == 20 / 1e6
    before = (photos / "out/a.png").stat().st_mtime_ns
    save(photos / "in/b.png")
    (photos / "in/d.psd").unlink()
    again = run(photos)
    assert counts(again) == (2, 1, 0, 0) and again.written == [photos / "out/b.png"]
    assert again.done_before == [photos / "out/a.png", photos / "out/sub/c.png"]
    assert (photos / "out/a.png").stat().st_mtime_ns == before
    assert counts(run(photos)) == (3, 0, 0, 0)
    (photos / "out/a.png").unlink()
    assert counts(run(photos)) == (2, 1, 0, 0)


def test_what_is_out_of_date_is_made_anew_and_said(photos):
    run(photos)
    save(photos / "in/a.png", 200)
    for changed, options in (
        ("the photo", {}),
        ("the options", {"strength": 0.5}),
        ("the model, the options", {"model": Invert()}),
        ("the model", {"model": nn.Conv2d(3, 3, 1)}),
    ):
        result = run(photos, **options)
        assert result.written and not result.skipped
        assert {note for _, note in result.notes} == {f"made anew: since its result was made, changed: {changed}"}
        assert counts(run(photos, **options)) == (3, 0, 0, 0)
    assert len(lines(photos / "out")) == 3


def test_a_result_that_could_not_be_made_anew_is_later(photos):
    """The old one stays until then, and is not taken for somebody else's."""
    run(photos)
    whole = (photos / "in/a.png").read_bytes()
    (photos / "in/a.png").write_text("no photo")
    assert counts(run(photos)) == (2, 0, 0, 1) and (photos / "out/a.png").exists()
    (photos / "in/a.png").write_bytes(whole)
    assert counts(run(photos)) == (2, 1, 0, 0)
    assert counts(run(photos)) == (3, 0, 0, 0)


def test_what_others_made_is_replaced_only_on_request(photos):
    (photos / "out").mkdir()
    (photos / "out/a.png").write_text("precious")
    result = run(photos, Invert())
    assert counts(result) == (0, 2, 1, 0) and "a.png exists already" in result.skipped[0][1]
    edited = photos / "out/b.png"
    edited.write_bytes(edited.read_bytes() + b"edited")
    assert [path.name for path, _ in run(photos, Invert(), strength=0.5).skipped] == ["a.png", "b.png"]
    with pytest.raises(UserError, match="3 results exist already\n.*a.png exists already"):
        run(photos, Invert(), on_exists="error")
    assert (photos / "out/a.png").read_text() == "precious" and edited.read_bytes().endswith(b"edited")
    assert counts(run(photos, Invert(), on_exists="overwrite")) == (0, 3, 0, 0)
    np.testing.assert_array_equal(np.asarray(Image.open(photos / "out/a.png"))[0, 0], (255, 156, 56))
    assert counts(run(photos, Invert(), on_exists="error")) == (3, 0, 0, 0)
    with pytest.raises(UserError, match="on_exists must be one of skip, overwrite, rename, error, got 'ask'"):
        run(photos, on_exists="ask")


def test_rename_takes_the_first_free_name(photos):
    save(photos / "in/a-1.png", 9)
    (photos / "out").mkdir()
    for name in ("a.png", "a-2.png"):
        (photos / "out" / name).write_text("precious")
    result = run(photos, on_exists="rename")
    assert [path.name for path in result.written] == ["a-1.png", "a-3.png", "b.png", "c.png"]
    assert counts(run(photos, on_exists="rename")) == (4, 0, 0, 0)
    assert (photos / "out/a.png").read_text() == (photos / "out/a-2.png").read_text() == "precious"
    again = run(photos, Invert(), on_exists="rename")
    assert [path.name for path in again.written] == ["a-1-1.png", "a-4.png", "b-1.png", "c-1.png"]


def test_a_result_that_appears_meanwhile_is_left_alone(photos):
    model = Calls(lambda count: (photos / "out/a.png").write_text("precious") if count == 1 else None)
    result = run(photos, model)
    assert [path.name for path, _ in result.failed] == ["a.png"] and "has appeared meanwhile" in result.failed[0][1]
    assert (photos / "out/a.png").read_text() == "precious"


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from PIL import Image
from autohdr.enhance import enhance
from autohdr.enhance.manifest import Manifest
from autohdr.edits import SHIPPED

def end():
    os.kill(os.getpid(), signal.SIGKILL)

def die(kind, number):
    count, replace, append = 0, os.replace, Manifest._append
    def counted(*arguments):
        nonlocal count
        count += 1
        if kind == "before" and count == number:
            end()
        replace(*arguments)
        if kind == "after" and count == number:
            end()
    def cut(self, record, durable=False):
        nonlocal count
        count += 1
        if count == number:
            with open(self.path, "ab") as file:
                file.write(record.line()[:-9])
            end()
        append(self, record, durable)
    if kind == "within":
        Manifest._append = cut
    else:
        os.replace = counted

inputs, root = Path(sys.argv[1]), Path(sys.argv[2])
photos, files, settings = 3, 1, {}
if sys.argv[4] == "edits":
    photos, files, settings = 1, 3, {"model": SHIPPED, "save_edit": True}
replaced = 1 + photos * files + 1  # begin, what is written, end
kills = {"before": replaced, "after": replaced, "within": 2 * photos}  # two lines a photo
if sys.argv[3] == "changed":
    enhance([inputs], root / "first", strength=0.5, progress=False, **settings)
for kind, most in list(kills.items())[files > 1 :]:
    for number in range(1, most + 1):
        out = root / f"{kind}{number}"
        if (root / "first").exists():
            shutil.copytree(root / "first", out)
        if os.fork() == 0:
            die(kind, number)
            enhance([inputs], out, progress=False, jobs=1, **settings)
            os._exit(0)
        assert os.wait()[1] == signal.SIGKILL, (kind, number)
"""


@pytest.mark.parametrize("before, what", [("new", "photos"), ("changed", "photos"), ("changed", "edits")])
def test_a_kill_anywhere(photos, before, what):
    """Into an empty folder, and over results that are out of date: the rerun finishes, and nothing is there but whole results."""
    inputs, settings = (photos / "in", {}) if what == "photos" else (photos / "in/sub", {"save_edit": True})
    command = [sys.executable, "-c", KILLED, str(inputs), str(photos / "killed"), before, what]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    model = load_checkpoint() if settings else None
    whole = enhance([inputs], photos / "out", model, progress=False, **settings)
    names = {str(path.relative_to(photos / "out")) for path in (photos / "out").rglob("*.*")}
    assert names == (
        {"autohdr.jsonl", "c.json", "c.cube", "c.png"} if settings else {"autohdr.jsonl", "a.png", "b.png", "sub/c.png"}
    )
    for out in sorted((photos / "killed").iterdir()):
        result = enhance([inputs], out, model, progress=False, **settings)
        count = len(result.done_before) + len(result.written)
        assert count == len(whole.written) and not result.skipped and not result.failed, out
        assert {line["status"] for line in lines(out).values()} == {"written"} and len(lines(out)) == count
        assert {str(path.relative_to(out)) for path in out.rglob("*.*")} == names
        for name in names - {"autohdr.jsonl"}:
            assert (out / name).read_bytes() == (photos / "out" / name).read_bytes()


def test_an_edits_files_go_by_the_rule_of_the_photos(photos):
    """Foreign ones, and ones that somebody carried on with, are neither overwritten nor left unsaid."""
    model, out = load_checkpoint(), photos / "out"

    def again(**options):
        return enhance([photos / "in/a.png", photos / "in/b.png"], out, model, progress=False, save_edit=True, **options)

    out.mkdir()
    (out / "a.json").write_text("precious")
    result = again()
    assert counts(result) == (0, 1, 1, 0) and f"{out / 'a.json'} exists already" in result.skipped[0][1]
    assert not (out / "a.png").exists() and not (out / "a.cube").exists()
    with pytest.raises(UserError, match="1 results exist already\n.*a.json exists already"):
        again(on_exists="error")
    (out / "a-1.cube").write_text("precious")
    assert [path.name for path in again(on_exists="rename").written] == ["a-2.png"]
    assert counts(again(on_exists="rename")) == (2, 0, 0, 0)
    (out / "b.cube").write_text("carried on")
    assert counts(again(on_exists="rename")) == (2, 0, 0, 0)
    assert [path.name for path, _ in again(strength=0.5).skipped] == ["a.png", "b.png"]
    assert [(out / name).read_text() for name in ("a.json", "a-1.cube", "b.cube")] == ["precious", "precious", "carried on"]
    assert counts(again(on_exists="overwrite")) == (0, 2, 0, 0)
    assert "curves" in (out / "a.json").read_text() and "LUT" in (out / "b.cube").read_text()
    assert counts(again()) == (2, 0, 0, 0)
    (out / "b.json").unlink()
    result = again()
    assert counts(result) == (1, 1, 0, 0) and result.notes[0][1].endswith("changed: the edit beside it")
    assert counts(again(strength=0.5)) == (0, 2, 0, 0) and '"strength": 0.5' in (out / "a.json").read_text()
    model.predict = lambda image: (out / "a.json").write_text("precious") and type(model).predict(model, image)
    (out / "a.png").unlink()
    (out / "a.json").unlink()
    result = again(strength=0.5)
    assert counts(result) == (1, 0, 0, 1) and result.failed[0][1] == f"{out / 'a.json'} has appeared meanwhile"
    assert (out / "a.json").read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_everything_whole(photos, number):
    """The photo in work is given up; one that is past the model is written."""

    def stop(count):
        if count == 2:
            os.kill(os.getpid(), number)
            time.sleep(9)

    with pytest.raises(Interrupted) as stopped:
        run(photos, Calls(stop))
    assert counts(stopped.value.result) == (0, 1, 0, 0) and stopped.value.signal == number
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert lines(photos / "out").keys() == {"a.png"} and not (photos / "out/sub").exists()
    assert counts(run(photos, Calls(lambda count: None))) == (1, 2, 0, 0)


SHARDS = """
import os, sys
from pathlib import Path
from autohdr.enhance import enhance

inputs, out, shards = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "shards"
for index in range(16):
    if os.fork() == 0:
        if shards:
            enhance([inputs], out, shard=(index + 1, 16), progress=False, jobs=1)
        else:
            enhance([inputs / str(index)], out, progress=False, jobs=1)
        os._exit(0)
assert [os.wait()[1] for index in range(16)] == [0] * 16
"""


@pytest.mark.parametrize("how", ["shards", "folders"])
def test_sixteen_processes_into_one_folder_lose_no_line(tmp_path, how):
    """Shards, each with its manifest, or runs over different photos, with one."""
    names = {f"{index % 16}/{index:02}.png" for index in range(40)}
    for name in names:
        save(tmp_path / "in" / name)
    command = [sys.executable, "-c", SHARDS, str(tmp_path / "in"), str(tmp_path / "out"), how]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    manifests = [path.name for path in (tmp_path / "out").glob("*.jsonl")]
    if how == "folders":
        assert manifests == ["autohdr.jsonl"]
        assert lines(tmp_path / "out").keys() == {name.partition("/")[2] for name in names}
        return
    assert set(manifests) == {f"autohdr.{index}-of-16.jsonl" for index in range(1, 17)}
    assert lines(tmp_path / "out").keys() == names
    assert counts(run(tmp_path, shard=(2, 3))) == (13, 0, 0, 0)  # other shards know them too
    assert counts(run(tmp_path)) == (40, 0, 0, 0)
    assert [path.name for path in (tmp_path / "out").glob("*.jsonl")] == ["autohdr.jsonl"] and len(lines(tmp_path / "out")) == 40


def test_shards_are_parts_of_the_sorted_photos(photos):
    (photos / "in/z.psd").write_text("none")
    results = [run(photos, shard=(part, 2)) for part in (1, 2)]
    assert [counts(result) for result in results] == [(0, 2, 1, 0), (0, 1, 0, 0)]
    assert [path.name for path in results[0].written] == ["a.png", "c.png"]
    assert counts(run(photos, shard=(9, 9))) == (0, 0, 0, 0)
    for shard in ((0, 4), (5, 4)):
        with pytest.raises(UserError, match="shard must be from 1/N to N/N, got [05]/4"):
            run(photos, shard=shard)


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff") + " é\u2028.png"
    save(tmp_path / "in" / name)
    assert counts(run(tmp_path)) == (0, 1, 0, 0)
    assert lines(tmp_path / "out")[name]["source"] == str(tmp_path / "in" / name)
    assert (tmp_path / "out/autohdr.jsonl").read_bytes().decode("utf-8").endswith("}\n")
    assert counts(run(tmp_path)) == (1, 0, 0, 0)


def test_a_full_disk_under_the_manifest(photos, monkeypatch):
    """A photo that can't be claimed has failed; a line that can't be added is there at the end."""
    append = Manifest._append

    def full(self, record, durable=False):
        if durable != (record.result == "b.png"):
            return append(self, record, durable)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "_append", full)
    result = run(photos)
    assert counts(result) == (0, 2, 0, 1) and "No space left on device" in result.failed[0][1]
    assert {name: line["status"] for name, line in lines(photos / "out").items()} == {
        "a.png": "written",
        "b.png": "failed",
        "sub/c.png": "written",
    }
    assert not (photos / "out/b.png").exists()


def test_a_manifest_of_something_else_is_refused(photos):
    (photos / "out").mkdir()
    for text in ("[1]\n", '{"photo": "a.png"}\n', "text\n"):
        (photos / "out/autohdr.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"autohdr.jsonl:1: expected a line of a manifest"):
            run(photos)
        assert (photos / "out/autohdr.jsonl").read_text() == text


def test_two_edits_of_one_name_are_refused(photos):
    from autohdr.models import load_checkpoint

    save(photos / "in/a.tif")
    with pytest.raises(UserError, match="a.png and .*a.tif would have their edits in one file|a.tif and .*a.png would have"):
        run(photos, load_checkpoint(), save_edit=True)


def test_stages_overlap_in_order_and_within_bounds():
    """No more are in flight than may be, by number and by cost, and every error stays with its item."""
    lock, held, most, alive = threading.Lock(), set(), 0, threading.active_count()

    def first(item):
        nonlocal most
        with lock:
            held.add(item)
            most = max(most, len(held))
        time.sleep(0.002 * (item % 3))
        if item == 5:
            raise ValueError("first")
        return item

    def last(item):
        time.sleep(0.001 * (item % 4))
        if item == 9:
            raise ValueError("last")
        return -item

    def middle(item):
        assert threading.current_thread() is threading.main_thread()
        if item == 7:
            held.discard(item)
            return None
        return item

    for threads, budget, bound in ((3, 99, 7), (3, 4, 4), (3, 0, 1), (1, 99, 3)):
        most = 0
        stages = {"threads": threads, "cost": lambda item: 1, "budget": budget, "stopped": lambda: False}
        seen = []
        for item, outcome in overlap(range(40), first, middle, last, **stages):
            held.discard(item)
            seen.append(item)
            assert str(outcome) == {5: "first", 9: "last"}.get(item, str(-item))
        assert seen == [item for item in range(40) if item != 7] and most <= bound
    assert threading.active_count() == alive


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_read_and_write_during_the_middle_stage(threads):
    read, written = ([threading.Event() for _ in range(6)] for _ in range(2))

    def middle(item):
        assert item == 5 or read[item + 1].wait(9)
        assert item == 0 or written[item - 1].wait(9)
        return item

    stages = {"threads": threads, "cost": lambda item: 1, "budget": 99, "stopped": lambda: False}
    outcomes = overlap(
        range(6), lambda item: read[item].set() or item, middle, lambda item: written[item].set() or item, **stages
    )
    assert list(outcomes) == [(item, item) for item in range(6)]


def test_no_item_begins_once_stopped():
    begun = []
    stages = {"threads": 2, "cost": lambda item: 1, "budget": 99, "stopped": lambda: len(begun) > 5}
    ended = [item for item, _ in overlap(range(40), lambda item: begun.append(item) or item, lambda x: x, lambda x: x, **stages)]
    assert len(begun) <= 8 and ended == list(range(len(ended))) and len(ended) >= 3


def test_few_photos_are_in_memory_at_once(tmp_path, monkeypatch):
    """Of forty, no more than two threads need."""
    for index in range(40):
        save(tmp_path / "in" / f"{index:02}.png")
    from autohdr.enhance.enhancer import Enhancer

    read, encode, held, most = Enhancer.read, Enhancer.encode, 0, 0

    def counted(self, path):
        nonlocal held, most
        held += 1
        most = max(most, held)
        return read(self, path)

    def freed(self, work):
        nonlocal held
        time.sleep(0.003)
        held -= 1
        return encode(self, work)

    monkeypatch.setattr(Enhancer, "read", counted)
    monkeypatch.setattr(Enhancer, "encode", freed)
    assert counts(run(tmp_path, jobs=2)) == (0, 40, 0, 0) and most <= 5


def test_jobs_out_of_range(photos):
    for jobs, message in ((0, "jobs must be at least 1, got 0"), (10**6, "expected at most")):
        with pytest.raises(UserError, match=message):
            run(photos, jobs=jobs)


def test_progress_is_a_bar_on_a_terminal(photos, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    enhance([photos / "in"], photos / "out")
    captured = capsys.readouterr()
    assert captured.out == "" and "3/3" in captured.err and "MP/s" in captured.err


def test_progress_is_a_line_now_and_then_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "EVERY", 0.01)
    lines, until = "", time.monotonic() + 60
    with progress_module.Progress(3) as progress:
        progress.step(0.5)
        while "1/3" not in lines and time.monotonic() < until:
            time.sleep(0.01)
            lines += capsys.readouterr().err
    assert re.fullmatch(r"(enhance: [01]/3 photos, \d+\.\d MP/s, (-|\d+:\d+) left\n)+", lines)


def test_no_progress_on_standard_output(photos, capsys):
    enhance([photos / "in"], photos / "out")
    captured = capsys.readouterr()
    assert not captured.out and not captured.err


def test_the_newest_line_of_all_manifests_counts(tmp_path):
    old = Record("/a.png", "a.png", "failed", "reason", time="2026-01-01T00:00:00.000+00:00")
    new = Record("/a.png", "a.png", "written", result_sha256="12", time="2026-01-02T00:00:00.000+00:00")
    for record, shard in ((new, (1, 2)), (old, (2, 2))):
        Manifest(tmp_path, shard).begin([record])
    assert Manifest(tmp_path).read() == {"a.png": new}
    with open(tmp_path / "autohdr.1-of-2.jsonl", "ab") as file:
        file.write(b'{"source": "/b.png", "resu')  # killed here
    manifest = Manifest(tmp_path)
    manifest.begin([])
    manifest.end()
    assert lines(tmp_path).keys() == {"a.png"} and os.listdir(tmp_path) == ["autohdr.jsonl"]


@pytest.fixture(scope="module")
def light():
    light = render_scene(100, 96, 144).radiance.astype(np.float32)
    return light * np.float32(0.2 / np.percentile(light, 75))


def expose(path, light, stop, second, marks=0):
    exif = Image.Exif()
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.DateTimeOriginal] = f"2025:06:01 12:00:{second:02}"
    details[ExifTags.Base.ExposureTime], details[ExifTags.Base.ExposureBiasValue] = 2.0**stop / 100, float(stop)
    pixels = np.rint(encode(light * np.float32(2.0**stop)) * 255).astype(np.uint8)
    pixels[:marks] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


def test_brackets_become_one_result_and_a_rerun_knows(tmp_path, light):
    """With the middle one's name and EXIF, a line that names all, and made anew where any of them changes."""
    for second, (name, stop) in enumerate((("a", 0), ("b", -2), ("c", 2))):
        expose(tmp_path / f"in/{name}.jpg", light, stop, second)
    expose(tmp_path / "in/d.jpg", light, 0, 50)
    save(tmp_path / "in/e.png")
    result = run(tmp_path, brackets="auto")
    assert [path.name for path in result.written] == ["a.jpg", "d.jpg", "e.png"]
    word = "its EXIF does not say when and how it was exposed: it is taken for a single photo"
    assert result.notes == [(tmp_path / "in/e.png", word)]
    found = lines(tmp_path / "out")
    hashes = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / f"in/{x}.jpg" for x in "bac")}
    assert list(found["a.jpg"]["exposures"].items()) == list(hashes.items()) and found["d.jpg"]["exposures"] == {}
    with Image.open(tmp_path / "out/a.jpg") as image:
        assert image.format == "JPEG" and image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureBiasValue] == 0
    merged = (tmp_path / "out/a.jpg").read_bytes()
    assert merged != (tmp_path / "out/d.jpg").read_bytes()
    assert counts(run(tmp_path, brackets="auto")) == counts(run(tmp_path, brackets="3")) == (3, 0, 0, 0)
    expose(tmp_path / "in/c.jpg", light, 2, 2, marks=4)
    again = run(tmp_path, brackets="auto")
    assert again.notes == [(tmp_path / "in/a.jpg", "made anew: since its result was made, changed: its bracket")]
    assert (tmp_path / "out/a.jpg").read_bytes() != merged
    single = run(tmp_path)
    assert counts(single) == (2, 3, 0, 0) and {path.name for path in single.written} == {"a.jpg", "b.jpg", "c.jpg"}


def test_a_damaged_exposure_fails_its_bracket_by_name(tmp_path, light, monkeypatch):
    for second, (name, stop) in enumerate((("a", 0), ("b", -2), ("c", 2))):
        expose(tmp_path / f"in/{name}.jpg", light, stop, second)
    whole = batch_module.bracket_sets

    def then_damage(*args):
        found = whole(*args)
        (tmp_path / "in/c.jpg").write_text("no photo")
        return found

    monkeypatch.setattr(batch_module, "bracket_sets", then_damage)
    result = run(tmp_path, brackets="3")
    assert counts(result) == (0, 0, 0, 1) and "c.jpg: not a JPEG" in result.failed[0][1]
    with pytest.raises(UserError, match="brackets must be one of off, auto, 3, 5, got '4'"):
        run(tmp_path, brackets="4")


def test_a_bracket_is_of_a_property_too(tmp_path, light):
    for second, (name, stop) in enumerate((("a", 0), ("b", -2), ("c", 2), ("d", 0.3))):
        expose(tmp_path / f"in/{name}.jpg", light, stop, second + 30 * (name == "d"))
    model = load_checkpoint()
    assert counts(run(tmp_path, model, brackets="auto", property=True)) == (0, 2, 0, 0)
    shared = {line["options"]["property"] for line in lines(tmp_path / "out").values()}
    assert len(shared) == 1 and None not in shared
    assert counts(run(tmp_path, model, brackets="auto", property=True)) == (2, 0, 0, 0)
