"""A page of a run as it stands: its curves, samples and events. It reads the run folder, and writes nothing there."""

import json
import math
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from autohdr.errors import UserError
from autohdr.files import write_text
from autohdr.models import read_metadata
from autohdr.report.page import data_uri, document, filled
from autohdr.train import lock
from autohdr.train.config import TrainConfig, load_config
from autohdr.train.folder import STATE

SILENT = 600
"""A run from which nothing has come for so many seconds, or for as long as two epochs take, is stale."""
SHOWN_EVENTS = 200
_POINTS = 300  # of a curve; more would be less than a pixel apart
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 360, 190, 46, 8, 14, 22  # of a chart and its margins, in units of its viewBox

Points = list[tuple[float, float]]
Event = tuple[int, str, str]
"""Step, kind and what there is to say."""


@dataclass(frozen=True)
class Observed:
    """What a run folder says of its run."""

    out: Path
    config: TrainConfig
    entries: list[dict[str, Any]]
    """The log's lines."""
    unreadable: int
    """Lines that are none of a run's log. A last one that is still being written does not count."""
    state: str
    """running, stopped, finished or stale."""
    why: str
    """What the state means here."""
    left: float | None
    """Seconds to the end, by the last epochs; None where no epoch has ended or the run does not go on."""

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["kind"] == kind]


def watch(out: Path, html: Path | None = None, port: int = 0) -> None:
    """Serve the page of the run in the folder `out` to this machine's browsers until Ctrl-C, or write it to the file `html`.

    port: 0: a free one. Raises UserError for a folder without a run, a port that can't be had, and an `html` in the run folder.
    """
    page = render(observe(out))
    if html:
        if html.resolve().is_relative_to(out.resolve()):
            raise UserError(f"--html: expected a file outside of the run folder, where `watch` writes nothing; got {html}")
        write_text(html, page)
        print(html)
        return
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port: expected 0 to 65535, got {port}")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(out))
    except OSError as error:
        raise UserError(f"--port: {port} can't be had on 127.0.0.1: {error.strerror}") from None
    with server:
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def _handler(out: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = 404, "text/plain", "not found\n"
            # Under another name it would be any page's: one whose own name leads to 127.0.0.1.
            if (self.headers["Host"] or "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                status, body = 403, "expected the host 127.0.0.1 or localhost\n"
            elif self.path == "/":
                try:
                    status, kind, body = 200, "text/html", render(observe(out))
                except (UserError, OSError) as error:
                    status, body = 503, f"{error}\n"
            data = body.encode("utf-8", "backslashreplace")
            try:
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(data)
            except ConnectionError:  # the browser has gone
                pass

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def observe(out: Path) -> Observed:
    """Read the folder of a run that may be writing to it. Raises UserError where there is none."""
    if not (out / "config.toml").is_file():
        raise UserError(f"watch: expected the folder of a run, with its config.toml; got {out}")
    if folds := sorted(path.name for path in out.glob("fold_*")):
        raise UserError(f"watch: {out} is a cross-validation: watch one of its runs, {', '.join(folds)}")
    config = load_config(out / "config.toml")
    entries, unreadable = _read_log(out / "log.jsonl")
    ended = [entry for entry in entries if entry["kind"] == "epoch"]
    times = [_number(row, "seconds") for row in ended[-5:]]
    epoch = statistics.median([seconds for seconds in times if seconds is not None] or [0.0])
    now, written = time.time(), _newest(out / name for name in ("config.toml", "log.jsonl", STATE))
    holder, done, left = lock.held(out), ended[-1]["epoch"] if ended else 0, None
    if holder and now - written > max(SILENT, 2 * epoch):
        state, why = "stale", f"its process is there, but nothing has come from it for {_duration(now - written)}"
    elif holder:
        since = now - _newest(out / name for name in ("config.toml", "log.csv"))  # of the present epoch
        left = max(0.0, epoch * (config.epochs - done) - min(since, epoch)) if epoch else None
        when = "how long it takes shows after the first epoch" if left is None else f"about {_duration(left)} left"
        state, why = "running", when
    elif holder is False:
        state, why = "stale", "its process is gone without a word, as after a kill"
    elif done >= config.epochs:
        state, why = "finished", "all epochs are done"
    else:
        state, why = "stopped", "by a signal or an error, before its last epoch"
    return Observed(out, config, entries, unreadable, state, why, left)


def _read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """A log's entries, and how many lines are none; of a log that is being written."""
    entries, unreadable = [], 0
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]  # after the last line feed: half a line, or nothing
    for line in filter(bytes.strip, lines):
        try:
            entry = json.loads(line)
            valid = isinstance(entry, dict) and isinstance(entry["kind"], str) and _number(entry, "step") is not None
            valid = valid and (entry["kind"] != "epoch" or isinstance(entry["epoch"], int))
        except (ValueError, LookupError):
            valid = False
        if valid:
            entries.append(entry)
        else:
            unreadable += 1
    return entries, unreadable


def _number(entry: dict[str, Any], name: str) -> float | None:
    """An entry's finite number, or None: a loss may be null, or NaN in an older log."""
    value = entry.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _newest(files: Any) -> float:
    """When the last of the files was written."""
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def events(run: Observed) -> list[Event]:
    """What happened beside good steps, the newest first."""
    found = [(int(entry["step"]), entry["kind"], _said(entry)) for entry in run.entries if entry["kind"] not in ("step", "epoch")]
    header = (run.out / "config.toml").read_text("utf-8", "replace")
    found += [(int(step), "resumed", by) for step, by in re.findall(r"^# from step (\d+) on: (.*)$", header, re.MULTILINE)]
    for name in ("last", "best"):
        weights = run.out / f"checkpoint_{name}.safetensors"
        try:
            said, ago = read_metadata(weights), time.time() - weights.stat().st_mtime
            found.append((int(said["step"]), "saved", f"checkpoint_{name}, {_duration(ago)} ago"))
        except (UserError, OSError, LookupError, TypeError, ValueError):  # not there yet, or gone
            pass
    return sorted(reversed(found), key=lambda event: -event[0])


def _said(entry: dict[str, Any]) -> str:
    """The rest of a line of the log, in words."""
    said = str(entry.get("cause") or entry.get("source") or "")
    if "to" in entry:
        said = f"to the state after step {entry['to']}, {entry.get('undone')} good steps lost: {said}"
    sources = entry.get("sources")
    return f"{said}; {', '.join(Path(str(source)).name for source in sources)}" if isinstance(sources, list) else said


def render(run: Observed) -> str:
    """The page: HTML that needs no other file. Opened from a server, it renews itself every five seconds."""
    config, ended, happened = run.config, run.rows("epoch"), events(run)
    name = run.out.resolve().name
    facts = {"Epoch": f"{ended[-1]['epoch'] if ended else 0} of {config.epochs}"}
    if run.entries:
        facts["Step"] = f"{max(int(entry['step']) for entry in run.entries):,}"
    for metric, title, unit, digits in (("val_psnr", "PSNR", " dB", 2), ("val_ssim", "SSIM", "", 4)):
        values = [value for row in ended if (value := _number(row, metric)) is not None]
        if values:
            facts[f"{title}, last and best"] = f"{values[-1]:.{digits}f}, {max(values):.{digits}f}{unit}"
    if lost := Counter(kind for _, kind, _ in happened if kind not in ("resumed", "saved")):
        facts["Faults"] = ", ".join(f"{count} {kind}" for kind, count in lost.most_common())
    notes = []
    if not run.entries:
        notes.append("No step is in the log yet.")
    if run.unreadable:
        notes.append(f"{run.unreadable} lines of log.jsonl are none of a run's log, and left out.")
    if len(happened) > SHOWN_EVENTS:
        notes.append(f"The last {SHOWN_EVENTS} of {len(happened)} events.")
    body = filled(
        "watch.html",
        text={
            "name": name,
            "setting": f"{config.model}, {config.size} pixels, batches of {config.batch_size} × {config.accumulate}",
            "why": f"{run.state}: {run.why}",
            "state": run.state,
            "notes": " ".join(notes),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
        markup={
            "facts": "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items()),
            "charts": "".join(_charts(run)),
            "events": "".join(map(_event, happened[:SHOWN_EVENTS])) or "<tr><td colspan=3>None yet.</td></tr>",
            "samples": "".join(_samples(run)),
        },
    )
    return document(f"{run.state}: {name}", body, "watch.css", "watch.js", connect="'self'")


def _event(event: Event) -> str:
    step, kind, said = event
    return f"<tr><th scope=row>{step:,}</th><td>{escape(kind)}</td><td>{escape(said)}</td></tr>"


def _charts(run: Observed) -> list[str]:
    steps, ended = run.rows("step"), run.rows("epoch")
    losses = list(dict.fromkeys(key.removeprefix("train_") for row in ended for key in row if key.startswith("train_")))
    losses = losses or [key for key in (steps or [{}])[0] if key not in ("kind", "step", "epoch", "lr", "grad_norm")]
    parts = [name for name in losses if name != "loss"]
    drawn = {
        "Loss": _curves(steps, ["loss"]) or _curves(ended, ["train_loss"]),  # a short run may have no line of a step
        "Parts of the loss, unweighted": _curves(steps, parts) or _curves(ended, [f"train_{part}" for part in parts]),
        "L1": _curves(ended, ["train_l1", "val_l1"]),
        "Validation PSNR, dB": _curves(ended, ["val_psnr"]),
        "Validation SSIM": _curves(ended, ["val_ssim"]),
        "Learning rate": _curves(steps, ["lr"]) or _curves(ended, ["lr"]),
        "Gradient norm": _curves(steps, ["grad_norm"]),
    }
    if len(parts) < 2:
        del drawn["Parts of the loss, unweighted"]
    return [_chart(title, curves, title != "Learning rate") for title, curves in drawn.items() if curves]


def _curves(rows: list[dict[str, Any]], names: list[str]) -> dict[str, Points]:
    """{name: its (step, value)} of the rows' finite numbers, without an empty one."""
    curves = {}
    for name in names:
        points = [(float(row["step"]), float(value)) for row in rows if (value := _number(row, name)) is not None]
        if points:
            curves[name] = _thinned(points)
    return curves


def _thinned(points: Points) -> Points:
    """Means of as many neighbours as leave _POINTS points at most."""
    size = math.ceil(len(points) / _POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def _chart(title: str, curves: dict[str, Points], may_be_logarithmic: bool) -> str:
    """A figure: lines over the steps, on a logarithmic axis where they are far apart. Its values stand in data-curves too, for
    the reader who points at them."""
    xs, ys = ([point[axis] for points in curves.values() for point in points] for axis in (0, 1))
    by_powers = may_be_logarithmic and min(ys) > 0 and max(ys) > 20 * min(ys)  # of ten

    def height(value: float) -> float:
        return math.log10(value) if by_powers else value

    left, right = min(xs), max(max(xs), min(xs) + 1)
    low, high = height(min(ys)), height(max(ys))
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - height(y)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    drawn = []
    for tick in _powers(low, high) if by_powers else _ticks(low, high):
        y = place(left, tick).split(",")[1]
        drawn.append(f'<path class=grid d="M{_LEFT},{y}H{_WIDTH - _RIGHT}"/><text x={_LEFT - 5} y={y} dy=4>{_short(tick)}</text>')
    for tick in _ticks(left, right):
        x = place(tick, ys[0]).split(",")[0]
        drawn.append(f"<text class=x x={x} y={_HEIGHT - 6}>{_short(tick)}</text>")
    for number, points in enumerate(curves.values()):
        if len(points) == 1:
            x, y = place(*points[0]).split(",")
            drawn.append(f"<circle class=c{number % 6} cx={x} cy={y} r=2.5 />")
        else:
            drawn.append(f'<polyline class=c{number % 6} points="{" ".join(place(*point) for point in points)}"/>')
    named = enumerate(curves.items())
    keys = [f"<b class=c{number % 6}>{escape(name)}</b> {points[-1][1]:.4g}" for number, (name, points) in named]
    values = {name: [[round(x), float(f"{y:.4g}")] for x, y in points] for name, points in curves.items()}
    span = f'{{"left":{left},"right":{right},"edges":[{_LEFT / _WIDTH},{1 - _RIGHT / _WIDTH}]}}'
    name = f"{escape(title)}{' (logarithmic)' * by_powers}"
    return (
        f"<figure data-curves='{escape(json.dumps(values), quote=True)}' data-span='{span}'>"
        f"<figcaption>{name}</figcaption><p class=keys>{' · '.join(keys)}</p>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{name}, over the steps">{"".join(drawn)}</svg></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within the bounds."""
    power = 10 ** math.floor(math.log10((high - low) / 3))
    step = next((size * power for size in (5, 2) if size * power * 3 <= high - low), power)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within 10**low and 10**high, or the powers alone where those are many."""
    found = [size * 10.0**power for power in range(math.floor(low), math.ceil(high)) for size in (1, 2, 5)]
    found = [tick for tick in found if low <= math.log10(tick) <= high]
    return found if len(found) <= 6 else found[next(i for i, tick in enumerate(found) if math.log10(tick).is_integer()) :: 3]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}" if not 0 < abs(value) < 1e-3 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _samples(run: Observed) -> list[str]:
    """The newest sheet that is whole (one may be half written), and that of the best epoch."""
    found = [(path.stem.removeprefix("epoch_"), path) for path in run.out.glob("samples/epoch_*.jpg")]
    sheets = {int(epoch): path for epoch, path in found if epoch.isdecimal()}
    rows = [row for row in run.rows("epoch") if _number(row, run.config.best_metric) is not None]
    sign = -1 if run.config.best_metric == "val_l1" else 1
    best = max(rows, key=lambda row: sign * row[run.config.best_metric], default={"epoch": None})["epoch"]
    shown = []
    for epoch in sorted(sheets, reverse=True):
        if (shown and epoch != best) or not (uri := _sheet(sheets[epoch])):
            continue
        which = f"Epoch {epoch}{', the best' * (epoch == best)}: source, output, target"
        shown.append(f'<h2>{which}</h2><img class=sheet alt="{which}" src="{uri}">')
    return shown


def _sheet(path: Path) -> str | None:
    try:
        with Image.open(path) as picture:
            return data_uri(picture.convert("RGB"))
    except OSError:
        return None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 2880:
        return f"{minutes / 1440:.1f} days"
    if minutes >= 120:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
