"""One file in the place of another: all of it or nothing."""

import json
import os
import subprocess
import sys

import pytest

from autohdr.files import clear_abandoned, replacing, write_text


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    return path


def test_the_new_file_takes_the_name_at_the_end(old):
    with replacing(str(old)) as part:
        part.write_text("new")
        assert old.read_text() == "old"
        assert part.parent == old.parent and part.name.startswith(".")
    assert old.read_text() == "new"
    assert os.listdir(old.parent) == ["a.txt"]


def test_a_failure_leaves_the_old_file_alone(old):
    with pytest.raises(KeyboardInterrupt), replacing(old) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_alone(old, monkeypatch, call):
    def power_cut(*args):
        raise OSError("power cut")

    monkeypatch.setattr(os, call, power_cut)
    with pytest.raises(OSError, match="power cut"), replacing(old) as part:
        part.write_text("new")
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == ["a.txt"]


def test_the_content_is_on_the_disk_before_it_takes_the_name(old, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    with replacing(old) as part:
        part.write_text("new")
    assert order == ["fsync", "replace", "fsync"]  # the content, then the name


def test_a_name_that_is_not_utf8_can_be_written_and_read_as_json(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff") + " é\u2028"
    write_text(tmp_path / "a.json", json.dumps(name, ensure_ascii=False))
    assert (tmp_path / "a.json").read_bytes() == b'"caf\\udce9 \\udcff \xc3\xa9\xe2\x80\xa8"'
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == name


@pytest.mark.parametrize("name", ["r" * 255, "部" * 85, "a" * 244])
def test_the_longest_names_can_be_written(tmp_path, name):
    with replacing(tmp_path / name) as part:
        part.write_text("new")
    assert (tmp_path / name).read_text() == "new" and os.listdir(tmp_path) == [name]


def test_what_killed_processes_left_is_cleared(tmp_path):
    """Of this machine those of processes that are gone, of another those that have not been written to for an hour."""
    with replacing(tmp_path / "b.jpg") as mine:
        machine = mine.name.rpartition("@")[2]
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        old, new = tmp_path / ".c.jpg.1@elsewhere.part", tmp_path / ".d.jpg.1@elsewhere.part"
        kept = {mine, new, tmp_path / ".download.part", tmp_path / "e.jpg"}
        for path in {tmp_path / f".a.jpg.{gone.pid}@{machine}", old, *kept}:
            path.write_text("")
        os.utime(old, (0, 0))
        clear_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == kept
