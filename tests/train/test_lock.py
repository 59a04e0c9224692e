"""One process at a time on a run folder."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest
from runs import blank_curve, interrupt_at_step  # noqa: F401  blank_curve is a fixture

from autohdr.errors import UserError
from autohdr.train import lock
from autohdr.train.lock import Lock
from autohdr.train.loop import train

HOLDER = """
import sys
from pathlib import Path
from autohdr.train.lock import Lock
held = Lock(Path(sys.argv[1]))
held.take()
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_while_the_first_lives(make_config, monkeypatch):
    """Nothing of the first one's is touched; once that is killed, the run goes on."""
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        out = train(make_config()).out
    assert not (out / lock.NAME).exists()
    (out / ".checkpoint_last.state.pt.1.part").touch()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, out], text=True, **pipes) as holder:
        assert holder.stdout.readline() == "taken\n"
        before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
        for resume in (True, "auto"):
            with pytest.raises(UserError, match=f"out: .* is in use by process {holder.pid} on "):
                train(make_config(), resume=resume)
        assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
        holder.kill()
    assert train(make_config(), resume=True).epochs == 2
    assert not list(out.glob(".*"))


def test_a_start_that_was_killed_with_the_lock_begins_again(make_config):
    config = make_config(epochs=1)
    config.out.mkdir()
    (config.out / lock.NAME).write_text("process 1 on elsewhere x")
    assert train(config).epochs == 1


def test_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    """A holder that gives signs of life keeps others out; one that gives none any more has lost the lock."""

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 60.0)  # whoever lives gives a sign sooner, however busy the machine is
    first, second = Lock(tmp_path / "run"), Lock(tmp_path / "run")
    first.take()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        second.take()
    first._ended.set()  # it dies
    monkeypatch.setattr(lock, "STALE", 0.3)
    second.take()
    monkeypatch.setattr(lock, "STALE", 60.0)
    with pytest.raises(UserError, match="in use by"):
        Lock(tmp_path / "run").take()
    second.release()
    assert not (tmp_path / "run").exists()


def test_a_lock_that_is_held_never_looks_free(tmp_path):
    """Whoever reads the holder's sign between two of them finds one."""
    held, path, read = Lock(tmp_path / "run"), tmp_path / "run" / lock.NAME, []
    held.take()
    written = threading.Event()

    def look():
        while not written.is_set():
            read.append(path.read_bytes())

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(300):
        held._sign()
    written.set()
    reader.join()
    assert read and all(sign.startswith(b"process ") for sign in read)
    held.release()
