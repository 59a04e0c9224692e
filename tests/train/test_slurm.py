"""examples/train.slurm as Slurm would run it: two nodes, which are two torchruns here, stopped before the limit, and requeued."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import STATE, TINY, same, write_pairs

from autohdr.train.checkpoint import load_state
from autohdr.train.config import TrainConfig, dump_config

pytestmark = pytest.mark.drill
SCRIPT = Path(__file__).parents[2] / "examples" / "train.slurm"
SRUN = """#!/bin/bash
# The command once a node; a signal goes on to each, and the status is the highest.
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
for task in "${tasks[@]}"; do
    while wait "$task"; status=$?; kill -0 "$task" 2>/dev/null; do :; done
    ((status > worst)) && worst=$status
done
exit "${worst:-0}"
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.fixture
def submit(tmp_path):
    """submit(out, signalled=...) runs the script to its end; (exit status, jobs that it had requeued)."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    settings = {"model": "restormer_nano", "model_args": TINY, "size": 32, "batch_size": 2, "epochs": 15, "log_every": 1}
    settings |= {"train_pairs": write_pairs(tmp_path / "train", 7, 0), "val_pairs": write_pairs(tmp_path / "val", 2, 1)}
    settings |= {"workers": 0, "device": "cpu", "samples": 0}
    (tmp_path / "two.toml").write_text(dump_config(TrainConfig(**settings)))

    def run(out, signalled=False):
        job = next(job for job in range(4000, 5000) if is_free(20000 + job))
        requeued = tmp_path / f"requeued_{out.name}"
        env = os.environ | {"SLURM_JOB_ID": str(job), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        env |= {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "REQUEUED": str(requeued)}
        env |= {"OMP_NUM_THREADS": "1"}
        command = ["bash", SCRIPT, tmp_path / "two.toml", "--out", out]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
            while signalled and job.poll() is None and steps(out) < 5:
                time.sleep(0.02)
            if signalled:
                job.send_signal(signal.SIGUSR1)
            said = job.communicate(timeout=300)[0].decode()
        print(said)
        return job.returncode, len(requeued.read_text().split()) if requeued.exists() else 0

    return run


def is_free(port):
    with socket.socket() as made:
        return made.connect_ex(("127.0.0.1", port)) != 0


def steps(out):
    log = out / "log.jsonl"
    return log.read_text().count('"kind": "step"') if log.exists() else 0


def test_a_run_goes_on_after_each_limit(submit, tmp_path):
    """Bitwise where one ends that had the time: 30 steps of two processes, warned in the midst, requeued, and gone on."""
    out = tmp_path / "parts"
    status, requeued = submit(out, signalled=True)
    assert status != 0 and requeued == 1
    stopped = load_state(out / STATE)["step"]
    assert 5 <= stopped < 30 and not list(out.glob(".*"))
    assert submit(out) == (0, 1)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry["kind"] == "step"] == list(range(1, 31))
    assert f"from step {stopped} on" in (out / "config.toml").read_text()
    assert submit(tmp_path / "whole") == (0, 0)
    states = [load_state(tmp_path / name / STATE) for name in ("parts", "whole")]
    assert same(states[0]["model"], states[1]["model"]) and same(states[0]["optimizer"], states[1]["optimizer"])


def test_a_run_that_fails_by_itself_is_not_requeued(submit, tmp_path):
    (tmp_path / "train" / "pairs.jsonl").write_text("")
    status, requeued = submit(tmp_path / "failed")
    assert status != 0 and requeued == 0
