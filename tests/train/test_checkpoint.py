import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from runs import same

from autohdr.errors import UserError
from autohdr.train.checkpoint import _KEYS as KEYS
from autohdr.train.checkpoint import Background, load_newest, load_state, previous, restore_rng, rng_state, save_state, to_cpu


def make_state(**values):
    return dict.fromkeys(KEYS, 0) | values


def test_state_reads_back(tmp_path):
    state = make_state(step=3, history=[{"epoch": 1, "val_psnr": 20.5}], model={"w": torch.arange(3.0)})
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert torch.equal(loaded["model"].pop("w"), state["model"].pop("w"))
    assert loaded == state
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_failed_save_leaves_the_old_state(tmp_path):
    save_state(tmp_path / "state.pt", make_state(step=1))
    with pytest.raises(AttributeError):
        save_state(tmp_path / "state.pt", make_state(step=2, unpicklable=lambda: None))
    assert load_state(tmp_path / "state.pt")["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_once_no_state_has_shards_none_is_read_for_them(tmp_path, monkeypatch):
    (tmp_path / "shards" / "of no state").mkdir(parents=True)
    save_state(tmp_path / "state.pt", make_state(step=1))
    assert not (tmp_path / "shards").exists()
    monkeypatch.setattr("autohdr.train.checkpoint._read", None)
    save_state(tmp_path / "state.pt", make_state(step=2))


def test_rejects_a_missing_state(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        load_state(tmp_path / "state.pt")


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_rejects_a_damaged_state(tmp_path, keep):
    path = tmp_path / "state.pt"
    save_state(path, make_state(model={"w": torch.arange(100.0)}))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or foreign"):
        load_state(path)


@pytest.mark.parametrize(
    ("content", "missing"),
    [({key: 0 for key in KEYS if key != "rng"}, "rng$"), ({"w": torch.ones(1)}, "ema, .*"), (torch.ones(1), "ema, .*")],
    ids=["another version's", "weights", "tensor"],
)
def test_rejects_a_foreign_state(tmp_path, content, missing):
    save_state(tmp_path / "state.pt", content)
    with pytest.raises(UserError, match=f"expected a training state, got a file without {missing}"):
        load_state(tmp_path / "state.pt")


def test_rng_is_restored():
    before = rng_state()
    first = torch.rand(3)
    restore_rng(before)
    assert torch.equal(torch.rand(3), first)


def test_every_flipped_byte_is_found(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, make_state(model={"w": torch.arange(100.0)}))
    whole = path.read_bytes()
    for index in np.random.default_rng(0).integers(0, len(whole), 50):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(UserError, match="SHA-256 does not match"):
            load_state(path)


def test_a_damaged_state_never_displaces_the_good_one(tmp_path):
    path = tmp_path / "state.pt"
    for step in (1, 2):
        save_state(path, make_state(step=step))
    path.write_bytes(b"x" * 100)
    with pytest.warns(UserWarning, match="state.pt: .*going on from .*state.previous.pt, step 1"):
        assert load_newest(path)["step"] == 1
    save_state(path, make_state(step=3))
    assert load_state(path)["step"] == 3 and load_state(previous(path))["step"] == 1
    assert (tmp_path / "state.pt.damaged").read_bytes() == b"x" * 100


def test_keeps_the_last_states(tmp_path):
    path = tmp_path / "state.pt"
    for step in range(1, 6):
        save_state(path, make_state(step=step), keep=4)
    assert [load_state(file)["step"] for file in (path, *(previous(path, age) for age in (1, 2, 3)))] == [5, 4, 3, 2]
    assert len(list(tmp_path.iterdir())) == 4
    for file in (path, previous(path)):
        file.write_bytes(b"x" * 100)
    with pytest.warns(UserWarning) as warned:
        assert load_newest(path)["step"] == 3
    assert [str(warning.message).split(":")[0] for warning in warned] == [str(path), str(previous(path))]
    assert load_newest(path)["step"] == 3  # the damaged ones are out of the way


def test_keeps_only_the_newest(tmp_path):
    for step in (1, 2):
        save_state(tmp_path / "state.pt", make_state(step=step), keep=1)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"] and load_state(tmp_path / "state.pt")["step"] == 2


def test_a_copy_on_the_cpu_is_a_copy():
    tree = {"a": [torch.ones(2), 3], "b": {"c": torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last)}}
    copy = to_cpu(tree)
    assert same(copy, tree) and copy["b"]["c"].stride() == tree["b"]["c"].stride()
    tree["a"][0].zero_()
    assert copy["a"][0].tolist() == [1, 1]


def test_background_calls_keep_their_order_and_raise_later():
    done, background, gate = [], Background(), threading.Event()

    def write(number):
        gate.wait(30)
        if number == 2:
            raise OSError("disk full")
        done.append(number)

    background(write, 1)
    assert done == []  # the caller goes on
    gate.set()
    background(write, 2)
    assert done == [1]
    with pytest.raises(OSError, match="disk full"):
        background(write, 3)
    with pytest.raises(OSError, match="disk full"):
        background.wait()
    assert done == [1]


SAVER = """
import resource, sys
from pathlib import Path
import torch
from autohdr.train.checkpoint import _KEYS, save_state
path, limit = Path(sys.argv[1]), int(sys.argv[2])
step = 0
while True:
    step += 1
    if limit and step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save_state(path, dict.fromkeys(_KEYS, 0) | {"step": step, "model": torch.full((100_000,), float(step))})
    print(step, flush=True)
"""


def test_a_full_disk_leaves_the_old_states(tmp_path):
    """The third save may write 100 kB of its 400: the process fails, says why, and the second state is still there, whole."""
    done = subprocess.run([sys.executable, "-c", SAVER, tmp_path / "state.pt", "100000"], capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout.split() == ["1", "2"]
    assert "OSError: [Errno 27] File too large" in done.stderr and "state.pt" in done.stderr.splitlines()[-1]
    assert load_state(tmp_path / "state.pt")["step"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.previous.pt", "state.pt"]


def save_without_pause(path, ready):
    """As the trainer does: a copy, written by a thread, while the next one is made."""
    torch.set_num_threads(1)  # a fork has none of its parent's other OpenMP threads, and would wait for them
    background, weights = Background(), torch.zeros(100_000)
    for step in range(1, sys.maxsize):
        background(save_state, path, to_cpu(make_state(step=step, model=weights.fill_(step))), 3)
        if step == 2:  # the first is written
            ready.send(step)


def test_kill_at_random_moments_of_saving(tmp_path):
    """SIGKILL 50 times while a process saves without pause: whatever stands at the path is whole, 50 of 50."""
    path, context = tmp_path / "state.pt", multiprocessing.get_context("fork")
    for delay in np.random.default_rng(0).uniform(0, 0.02, 50):
        ours, theirs = context.Pipe(duplex=False)
        saver = context.Process(target=save_without_pause, args=(path, theirs))
        saver.start()
        assert ours.poll(30) and ours.recv() == 2
        time.sleep(delay)
        saver.kill()
        saver.join()
        assert saver.exitcode == -signal.SIGKILL
        for file in (path, *(file for file in (previous(path), previous(path, 2)) if file.exists())):
            state = load_state(file)
            assert torch.equal(state["model"], torch.full((100_000,), float(state["step"])))
    assert any(file.suffix == ".part" for file in tmp_path.iterdir())  # some of them were in the midst of writing
