"""The page of a run: made from folders as runs leave them, whole or not; and served."""

import http.client
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from test_page import Page

from autohdr.cli import main
from autohdr.errors import UserError
from autohdr.train import lock
from autohdr.train.config import TrainConfig, dump_config
from autohdr.train.lock import Lock
from autohdr.watch import observe, render, watch


def step(number, **more):
    return {"kind": "step", "step": number, "epoch": 1, "loss": 1 / number, "l1": 1 / number, "lr": 1e-3, "grad_norm": 2.0} | more


def epoch(number, **more):
    row = {"kind": "epoch", "epoch": number, "step": 10 * number, "lr": 1e-3, "train_loss": 0.3, "train_l1": 0.3 / number}
    return row | {"val_l1": 0.2, "val_psnr": 20.0 + number, "val_ssim": 0.8, "seconds": 120.0} | more


@pytest.fixture
def run(tmp_path):
    """make(log's lines, held=...) makes a run's folder, of four epochs."""
    taken = []

    def make(lines=(), name="run", held=False, header="", **settings):
        out = tmp_path / name
        (out / "samples").mkdir(parents=True, exist_ok=True)
        (out / "config.toml").write_text(dump_config(TrainConfig(out=out, **{"epochs": 4} | settings), header, inside=True))
        (out / "log.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        if held:
            code = "import sys; from pathlib import Path; from autohdr.train.lock import Lock; held = Lock(Path(sys.argv[1])); "
            code += "held.take(); print(flush=True); sys.stdin.read()"
            holder = subprocess.Popen([sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            taken.append(holder)
            holder.stdout.readline()
        return out

    yield make
    for holder in taken:
        holder.kill()
        holder.communicate()


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_shows_curves_events_and_samples(run):
    skipped = {"kind": "skipped", "cause": "a <spike>", "tensors": None, "in_a_row": 1, "sources": ["/a/one.jpg", "/a/two.jpg"]}
    back = {"kind": "rolled back", "cause": "two bad steps in a row", "to": 8, "undone": 3}
    noted = {"kind": "not saved", "cause": "[Errno 28] No space left on device"}
    lines = [step(5), skipped | {"step": 7, "epoch": 1}, step(10), epoch(1), back | {"step": 13, "epoch": 2}, step(15)]
    out = run([*lines, noted | {"step": 16, "epoch": 2}, epoch(2, val_psnr=19.5)], header="made by x\nfrom step 12 on: made by y")
    for number, colour in ((1, "red"), (2, "blue")):
        Image.new("RGB", (3000, 20), colour).save(out / "samples" / f"epoch_{number:03d}.jpg")
    before = files(out)
    page = Page(render(observe(out)))
    assert files(out) == before
    assert not any(word in page.text for word in ("http:", "https:", "url(", "@import"))
    assert [figure["data-curves"] for figure in page.all("figure")][0] == '{"loss": [[5, 0.2], [10, 0.1], [15, 0.06667]]}'
    titles = ["Loss", "L1", "Validation PSNR, dB", "Validation SSIM", "Learning rate", "Gradient norm"]
    assert page.texts["figcaption"] == titles
    assert json.loads(page.all("figure")[2]["data-curves"]) == {"val_psnr": [[10, 21], [20, 19.5]]}
    (body,) = re.findall(r"<tbody>(.*?)</tbody>", page.text, re.DOTALL)
    rows = [re.sub("<.*?>", "|", row) for row in body.split("</tr>")[:-1]]
    assert [row.strip("|").replace("||", "|") for row in rows] == [
        "16|not saved|[Errno 28] No space left on device",
        "13|rolled back|to the state after step 8, 3 good steps lost: two bad steps in a row",
        "12|resumed|made by y",
        "7|skipped|a &lt;spike&gt;; one.jpg, two.jpg",
    ]
    sheets = [image["alt"] for image in page.all("img")]
    assert sheets == ["Epoch 2: source, output, target", "Epoch 1, the best: source, output, target"]
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert page.texts["title"] == ["stopped: run"] and facts["Epoch"] == "2 of 4" and facts["Step"] == "20"
    assert facts["PSNR, last and best"] == "19.50, 21.00 dB"
    assert facts["Faults"] == "1 not saved, 1 rolled back, 1 skipped"


def test_a_run_that_has_only_begun(run):
    out = run()
    (out / "log.jsonl").unlink()
    page = Page(render(observe(out)))
    assert "No step is in the log yet." in page.text and "None yet." in page.text and not page.all("figure")


def test_half_written_lines_and_numbers_that_are_none(run):
    lines = [
        step(1, loss=None),
        '{"kind": "step", "step": 2, "loss": NaN, "lr": Infinity}\n',
        step(3),
        "no\n",
        "[2]\n",
        '{"step": 4}\n',
    ]
    lines += ['{"kind": "epoch", "step": 4, "epoch": null}\n', "\xff\n", epoch(1, val_psnr=None), '{"kind": "step", "st']
    out = run(lines)
    seen = observe(out)
    page = Page(render(seen))
    assert seen.unreadable == 5 and "5 lines of log.jsonl are none" in page.text
    curves = {title: json.loads(f["data-curves"]) for title, f in zip(page.texts["figcaption"], page.all("figure"), strict=True)}
    assert curves["Loss"] == {"loss": [[3, 0.3333]]} and "Validation PSNR, dB" not in curves and "NaN" not in page.text


def test_a_half_written_sample_gives_way_to_the_one_before(run):
    out = run([epoch(1), epoch(2)])
    Image.effect_noise((400, 100), 50).convert("RGB").save(out / "samples" / "epoch_001.jpg")
    whole = (out / "samples" / "epoch_001.jpg").read_bytes()
    (out / "samples" / "epoch_002.jpg").write_bytes(whole[: len(whole) // 2])
    assert [image["alt"] for image in Page(render(observe(out))).all("img")] == ["Epoch 1: source, output, target"]


def test_long_curves_are_thinned_by_means(run):
    page = Page(render(observe(run([step(number, loss=number % 2) for number in range(1, 2001)]))))
    (points,) = json.loads(page.all("figure")[0]["data-curves"]).values()
    assert 200 < len(points) <= 300 and all(abs(value - 0.5) < 0.1 for _, value in points)


@pytest.mark.parametrize(
    "values", [[0.0], [0.0, 0.0], [-1.0, 2.0], [1e-9, 1.0], [1e30, -1e30], [5e-324, 5e-324], [1.0, 1.0 + 1e-15]]
)
def test_any_values_can_be_drawn(run, values):
    page = Page(render(observe(run([step(number, loss=value) for number, value in enumerate(values, 1)]))))
    assert not re.search(r"points=\"[^\"]*(nan|inf)", page.text)


def test_says_how_long_it_takes_and_when_it_is_silent(run):
    out = run([epoch(1, seconds=100.0), epoch(2, seconds=120.0), epoch(3, seconds=200.0)], held=True, epochs=13)
    seen = observe(out)
    assert seen.state == "running" and 10 * 120 - 60 < seen.left <= 10 * 120 and re.fullmatch("about (19|20) min left", seen.why)
    for file in out.iterdir():
        os.utime(file, (time.time() - 5000,) * 2)
    seen = observe(out)
    assert seen.state == "stale" and "nothing has come from it for 83 min" in seen.why and seen.left is None
    assert observe(run(name="new", held=True)).why == "how long it takes shows after the first epoch"


def test_tells_a_killed_run_from_a_stopped_and_a_finished_one(run):
    out = run([epoch(1)])
    assert observe(out).state == "stopped"
    (out / lock.NAME).write_text("process 1 on elsewhere x")
    os.utime(out / lock.NAME, (0, 0))
    assert observe(out).state == "stale" and "as after a kill" in observe(out).why
    assert observe(run([epoch(number) for number in range(1, 5)], name="done")).state == "finished"


def test_asking_leaves_the_lock_alone(run):
    """It goes to whoever takes it next, and no file is made."""
    out = run()
    assert lock.held(out) is None
    out = run(name="held", held=True)
    assert lock.held(out)
    with pytest.raises(UserError, match="in use"):
        Lock(out).take()


def test_refuses_what_is_no_run(tmp_path, run, capsys):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="expected the folder of a run"):
            observe(folder)
    out = run()
    with pytest.raises(UserError, match="--html: expected a file outside of the run folder"):
        watch(out, out / "samples" / "page.html")
    with pytest.raises(UserError, match="--port: expected 0 to 65535, got 70000"):
        watch(out, port=70000)
    (out / "fold_0").mkdir()
    with pytest.raises(UserError, match="is a cross-validation: watch one of its runs, fold_0"):
        observe(out)
    assert main(["watch", str(tmp_path / "absent")]) == 2 and "Traceback" not in capsys.readouterr().err


def test_writes_a_file(run, tmp_path):
    assert main(["watch", str(run([step(1)])), "--html", str(tmp_path / "page.html")]) == 0
    assert Page((tmp_path / "page.html").read_text("utf-8")).texts["h1"] == ["run"]


def serve(out, pipe):
    sys.stdout = os.fdopen(pipe, "w")
    watch(out)


def test_serves_the_run_as_it_stands(run):
    out = run([epoch(1)])
    ours, theirs = os.pipe()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(out, theirs))
    server.start()
    try:
        with open(ours) as said:
            port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", said.readline())[1])

        def get(path="/", host="localhost"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", path, headers={"Host": f"{host}:{port}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        assert get()[0] == 200 and "1 of 4" in get()[1]
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(epoch(2)) + "\n")
        assert "2 of 4" in get()[1]
        assert get("/etc/passwd")[0] == 404 and get(host="example.com")[0] == 403
        with pytest.raises(UserError, match=rf"--port: {port} can't be had"):
            watch(out, port=port)
        (out / "config.toml").rename(out / "config.old")
        assert get() == (503, f"watch: expected the folder of a run, with its config.toml; got {out}\n")
        os.kill(server.pid, signal.SIGINT)
        server.join(30)
        assert server.exitcode == 0
    finally:
        server.kill()
        server.join()
