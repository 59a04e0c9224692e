"""Two gloo processes of torchrun do as one process does; NCCL and GPUs are not tried here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import STATE, TINY, blank_curve, interrupt_at_step, same, write_pairs  # noqa: F401  blank_curve is a fixture
from test_loop import outcome
from two_ranks import ADVERSARIAL

from autohdr import metrics
from autohdr.data.pairs import PairDataset, read_pairs
from autohdr.models import load_checkpoint
from autohdr.train.checkpoint import load_newest, load_state
from autohdr.train.config import TrainConfig, dump_config, load_config
from autohdr.train.distributed import Ranks
from autohdr.train.loop import train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0"]
PARALLEL = ["ddp", "fsdp"]
KINDS = [*PARALLEL, "sharded"]  # the last: FSDP2 with states of shards
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("two processes")]  # the set-up takes long, and serves all of them


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [1, 2, 5, 8, 13])
def test_every_sample_counts_once(count, samples):
    batch = list(range(samples))
    parts = [Ranks(rank, count).part(batch) for rank in range(count)]
    assert sorted(index for indices, counted in parts for index in indices[:counted]) == batch
    assert all(len(indices) == max(counted, 1) for indices, counted in parts)
    sizes = [counted for _, counted in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven pairs to train on and three to validate: every epoch's last step and last round of validation are uneven."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = {"model": "restormer_nano", "model_args": TINY, "size": 32, "batch_size": 4, "epochs": 2, "lr": 2e-3, "ema": 0.9}
    settings |= {"train_pairs": write_pairs(folder / "train", 7, 0), "val_pairs": write_pairs(folder / "val", 3, 1)}
    settings |= {"workers": 0, "device": "cpu", "log_every": 1, "samples": 3}
    (folder / "one.toml").write_text(dump_config(TrainConfig(out=folder / "one", **settings)))
    (folder / "two.toml").write_text(dump_config(TrainConfig(**settings | {"batch_size": 2})))
    (folder / "bad.jsonl").write_text("")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """A run of one process with the same pairs in a step."""
    return train(load_config(folder / "one.toml"))


@pytest.fixture(scope="module")
def two(folder):
    """The runs of two_ranks.py: what each process saw."""
    for kind in KINDS:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at_step(patch, 3)
            train(load_config(folder / "one.toml", {"out": folder / f"one to two {kind}"}))
    command = [*TORCHRUN, Path(__file__).with_name("two_ranks.py"), folder / "two.toml", folder]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def log(out, *kinds):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if line["kind"] in kinds]


def check_same_run(out, one):
    """The run in `out` is that of one process, to the rounding of sums taken in another order."""
    state, expected = load_state(out / STATE), load_state(one.out / STATE)
    before = load_state(one.out / STATE.replace(".pt", ".previous.pt"))  # of the epoch before
    found = [(state["model"], expected["model"], before["model"])]
    found.append((state["ema"]["model"], expected["ema"]["model"], before["model"]))
    if "adversary" in expected:
        found.append(tuple(of["adversary"]["model"] for of in (state, expected, before)))
    for weights, wanted, start in found:
        moved = sum((wanted[name] - start[name]).double().square().sum() for name in wanted).sqrt()
        apart = sum((wanted[name] - weights[name]).double().square().sum() for name in wanted).sqrt()
        assert apart < 2e-3 * moved
    assert [row["step"] for row in state["history"]] == [row["step"] for row in expected["history"]]
    for row, wanted in zip(state["history"], expected["history"], strict=True):
        for name in ("train_l1", "val_l1", "val_psnr", "val_ssim"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4)


@pytest.mark.parametrize("how", ["", " accumulating"])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_train_as_one(folder, one, two, parallel, how):
    check_same_run(folder / f"{parallel}{how}", one)
    assert two[0][f"{parallel}{how}"] == two[1][f"{parallel}{how}"]
    assert len(log(folder / f"{parallel}{how}", "step")) == 4  # one process writes
    assert (folder / f"{parallel}{how}" / "samples" / "epoch_001.jpg").is_file()


@pytest.mark.parametrize("parallel", KINDS)
def test_a_branch_with_frozen_parts_trains_as_one(folder, two, parallel):
    """From the end of the two processes' run, in a stage of other sizes; against one process from there."""
    stages = [{"epochs": 2}, {"epochs": 2, "size": 24, "batch_size": 2}]
    settings = {"out": folder / f"{parallel} tuned by one", "branch": folder / parallel, "stages": stages, "epochs": 4}
    alone = train(load_config(folder / "one.toml", settings | {"freeze": ["encoder*"], "lr_groups": {"output*": 0.5}}))
    check_same_run(folder / f"{parallel} tuned", alone)
    begun, weights = (load_state(folder / out / STATE)["model"] for out in (parallel, f"{parallel} tuned"))
    assert all(torch.equal(begun[name], weights[name]) == name.startswith("encoder") for name in begun)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_train_one_discriminator(folder, two, parallel):
    """It is the same in both, and that of one process; so is what the network makes of it. The one process takes its batches in
    the same halves: sums over four pairs, which round otherwise, leave a discriminator 0.4 % of its way apart."""
    settings = {"out": folder / "one adversarial", "losses": ADVERSARIAL, "batch_size": 2, "accumulate": 2}
    alone = train(load_config(folder / "one.toml", settings), resume="auto")
    check_same_run(folder / f"{parallel} adversarial", alone)
    rows = [load_state(out / STATE)["history"][-1] for out in (folder / f"{parallel} adversarial", alone.out)]
    for name in ("train_adversarial", "train_discriminator"):  # the hinge's margin is 1
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4)
    assert two[0][f"{parallel} adversarial"] == two[1][f"{parallel} adversarial"]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_learn_from_one_teacher(folder, two, parallel):
    """Its outputs, and its features, which hooks take within what FSDP2 shards."""
    settings = {"teacher": folder / parallel / "checkpoint_last.safetensors", "teacher_features_weight": 0.5}
    alone = train(load_config(folder / "one.toml", settings | {"out": folder / f"{parallel} taught by one"}))
    check_same_run(folder / f"{parallel} taught", alone)
    rows = [load_state(out / STATE)["history"][-1] for out in (folder / f"{parallel} taught", alone.out)]
    for name in ("train_teacher", "train_teacher_features"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4)
    assert two[0][f"{parallel} taught"] == two[1][f"{parallel} taught"]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_validation_counts_each_pair_once(folder, two, parallel):
    """The figures of three pairs in two processes are those of the saved weights, measured apart from the trainer."""
    out = folder / parallel
    model = load_checkpoint(out / "checkpoint_last.safetensors")
    items = [PairDataset(read_pairs(folder / "val" / "pairs.jsonl"), 32)[index] for index in range(3)]
    with torch.no_grad():
        values = [metrics.psnr(model(item["src"][None]).clamp(0, 1), item["tar"][None]).item() for item in items]
    assert load_state(out / STATE)["history"][-1]["val_psnr"] == pytest.approx(sum(values) / 3, rel=1e-5)


@pytest.mark.parametrize("parallel", KINDS)
def test_a_run_goes_on_in_another_number_of_processes(folder, one, two, parallel):
    check_same_run(folder / f"one to two {parallel}", one)
    stopped = folder / f"{parallel} stopped"
    assert load_state(stopped / STATE)["step"] == 3
    train(load_config(folder / "one.toml", {"out": stopped}), resume=True)
    check_same_run(stopped, one)


@pytest.mark.parametrize("parallel", KINDS)
def test_a_signal_to_one_process_stops_all_after_the_same_step(two, parallel):
    assert [seen[f"{parallel} stopped"]["interrupted"] for seen in two] == [signal.SIGTERM] * 2


def test_a_sharded_run_in_two_parts(folder, one, two):
    """Bitwise, where the number of processes is the same."""
    check_same_run(folder / "sharded", one)
    assert same(outcome(folder / "sharded"), outcome(folder / "sharded parts"))


def test_each_process_writes_its_part_of_a_state(folder, two):
    """Of each of the two states kept; the file that names them has no tensor of the network's size."""
    out = folder / "sharded"
    names = [torch.load(file)["shards"] for file in out.glob("*.state*.pt")]
    assert sorted(part["folder"] for part in names) == sorted(file.name for file in (out / "shards").iterdir())
    for part in names:
        sizes = [file.stat().st_size for file in sorted((out / "shards" / part["folder"]).iterdir())]
        assert len(sizes) == len(part["files"]) == 2 and min(sizes) > 0.8 * max(sizes)
    assert (out / STATE).stat().st_size < 0.5 * min(sizes)


def test_a_full_disk_of_one_process_leaves_the_run_going(folder, two):
    (entry,) = log(folder / "sharded unsaved", "not saved")
    assert "No space left on device" in entry["cause"]
    assert same(outcome(folder / "sharded unsaved"), outcome(folder / "sharded"))
    assert len(list((folder / "sharded unsaved" / "shards").iterdir())) == 2  # nothing is left of the one that failed


@pytest.mark.parametrize("fault", ["a flipped byte", "a missing file"])
def test_a_damaged_shard_is_found(folder, two, tmp_path, fault):
    """The state is set aside, and the one before it used."""
    out = tmp_path / "damaged"
    shutil.copytree(folder / "sharded", out)
    file = max((out / "shards" / torch.load(out / STATE)["shards"]["folder"]).iterdir())
    whole = file.read_bytes()
    file.unlink()
    if fault == "a flipped byte":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(UserWarning, match=f"{file.name}: .*going on from .*previous.pt, step 2"):
        assert load_newest(out / STATE)["step"] == 2
    assert train(load_config(folder / "one.toml", {"out": out}), resume=True).epochs == 2


@pytest.mark.parametrize("parallel", PARALLEL)
def test_processes_skip_the_same_step(folder, two, parallel):
    """NaN in one process's part of one gradient."""
    (entry,) = log(folder / f"{parallel} not finite", "skipped")
    assert (entry["step"], entry["tensors"]) == (3, ["output.weight"])
    assert two[0][f"{parallel} not finite"] == two[1][f"{parallel} not finite"]
    weights = load_state(folder / f"{parallel} not finite" / STATE)["model"]
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("parallel", PARALLEL)
def test_processes_roll_back_together(folder, two, parallel):
    (entry,) = log(folder / f"{parallel} spike", "rolled back")
    assert (entry["step"], entry["to"]) == (8, 5)
    assert two[0][f"{parallel} spike"] == two[1][f"{parallel} spike"]


def test_processes_overflow_together(folder, two):
    assert [seen["changed in float16"] for seen in two] == [[True, False, True, True]] * 2
    assert load_state(folder / "fsdp float16" / STATE)["scaler"]["scale"] == 2.0**15


def test_gradients_are_summed_once_a_step(two):
    """Two steps of two epochs: as many last buckets, though each step has two backward passes."""
    for seen in two:
        assert sum(seen["reductions"]) == 4


def test_wrong_input_stops_all(two):
    assert "expected at least one pair" in two[0]["refused"] and "process 0" in two[1]["refused"]


SLOW = """
import os, sys, time
from pathlib import Path
from autohdr.cli import main
from autohdr.train.step import Step

make, rank, out = Step.__call__, int(os.environ["RANK"]), Path(sys.argv[-1])

def slow(self, *args, step, **others):
    if step == 2:
        (out / f"pid_{rank}").write_text(str(os.getpid()))
        time.sleep(3600 * rank)
    return make(self, *args, step=step, **others)

Step.__call__ = slow
sys.exit(main())
"""


def test_a_killed_process_ends_all_and_the_run_goes_on(folder, one):
    """SIGKILL to the second process in step 3 of 4; the state after step 2 goes on in one process to the same end."""
    out = folder / "killed"
    (folder / "slow.py").write_text(SLOW)
    command = [*TORCHRUN, folder / "slow.py", "train", folder / "two.toml", "--out", out]
    run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while run.poll() is None and not all((out / f"pid_{rank}").exists() and (out / f"pid_{rank}").read_text() for rank in (0, 1)):
        time.sleep(0.05)
    pids = [int((out / f"pid_{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    said = run.communicate(timeout=600)[0].decode()  # raises where anyone is still there by then
    assert run.returncode != 0 and f"exitcode  : -9 (pid: {pids[1]})" in said
    assert not Path(f"/proc/{pids[0]}").exists()
    print(f"the other process was gone {time.monotonic() - killed:.1f} s after the kill")
    assert load_state(out / STATE)["step"] == 2
    train(load_config(folder / "one.toml", {"out": out}), resume=True)
    check_same_run(out, one)


SAVING = """
import itertools, os, sys, time
from pathlib import Path
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from autohdr.cli import main

write, count, rank, out = HuggingFaceStorageWriter.write_data, itertools.count(1), int(os.environ["RANK"]), Path(sys.argv[-1])

def slow(self, *args):
    done = write(self, *args)
    if next(count) == 3 and rank == 1:
        (out / "pid").write_text(str(os.getpid()))
        time.sleep(3600)
    return done

HuggingFaceStorageWriter.write_data = slow
sys.exit(main())
"""


def test_a_process_killed_while_it_writes_its_shards(folder):
    """SIGKILL to the second of two, in the save after step 2: the state after step 1 goes on, in three, to the same end."""
    (folder / "saving.py").write_text(SAVING)
    out, env = folder / "killed while saving", os.environ | {"OMP_NUM_THREADS": "1"}
    train_it = ["train", folder / "two.toml", "--parallel", "fsdp", "--sharded-states", "--save-every", "1"]
    command = [*TORCHRUN, folder / "saving.py", *train_it, "--batch-size", "3", "--out", out]
    run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not ((out / "pid").exists() and (out / "pid").read_text()):
        time.sleep(0.05)
    os.kill(int((out / "pid").read_text()), signal.SIGKILL)
    assert run.wait(timeout=600) != 0
    assert load_state(out / STATE)["step"] == 1
    three = [argument if argument != "2" else "3" for argument in TORCHRUN]
    command = [*three, "-m", "autohdr", *train_it, "--batch-size", "2", "--out", out, "--resume"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((out / "shards").iterdir())) == 2
    check_same_run(out, train(load_config(folder / "one.toml", {"out": folder / "six", "batch_size": 6})))
