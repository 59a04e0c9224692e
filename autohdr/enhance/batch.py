"""Photo files into a folder: which are to be done, what became of each, and all of them at the pace of the slowest stage."""

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autohdr.arrays import Array
from autohdr.data.bracket_sets import bracket_sets
from autohdr.data.conversion import result_name
from autohdr.data.images import KINDS, photo_layout, photos_in
from autohdr.edits import ArrayLite, Prediction, of_property
from autohdr.enhance.enhancer import EDIT_SUFFIXES, Enhancer, edit_files, failure
from autohdr.enhance.manifest import FAILED, PENDING, SKIPPED, WRITTEN, Manifest, Record, now
from autohdr.enhance.overlap import overlap
from autohdr.enhance.progress import Progress
from autohdr.enhance.work import Work
from autohdr.errors import UserError
from autohdr.files import clear_abandoned, replacing, sha256, write_text
from autohdr.measure import check_workers, cores, free_bytes
from autohdr.signals import Abandoned, Deferred, deferred_signals

if TYPE_CHECKING:
    from torch import nn

BRACKETS = ("off", "auto", "3", "5")
ON_EXISTS = ("skip", "overwrite", "rename", "error")
COPIES = 3  # of a photo's pixels at most while it waits: as in the file, in sRGB, and edited
SHARE = 4  # a quarter of the free memory is for photos that wait


@dataclass
class EnhanceResult:
    """What became of the photos, in their order, in four lists. megapixels: of the written ones. seconds: of the whole run."""

    manifest: Path
    done_before: list[Path] = field(default_factory=list)  # results
    written: list[Path] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # (input, reason): nothing was tried
    failed: list[tuple[Path, str]] = field(default_factory=list)  # (input, reason)
    notes: list[tuple[Path, str]] = field(default_factory=list)  # (input, what is not as it was in a result)
    megapixels: float = 0.0
    seconds: float = 0.0

    def counts(self) -> dict[str, int]:
        return {name: len(getattr(self, name)) for name in ("done_before", "written", "skipped", "failed")}

    def json(self) -> str:
        """The counts, and what was not done or not as it was, in a line. What the manifest says more is not repeated."""
        named = {"skipped": "reason", "failed": "reason", "notes": "note"}
        lists = {name: [{"source": str(path), what: text} for path, text in getattr(self, name)] for name, what in named.items()}
        facts = {"megapixels": self.megapixels, "seconds": self.seconds, "manifest": str(self.manifest)}
        return json.dumps({"counts": self.counts()} | facts | lists)

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in self.counts().items())
        speed = f", {self.megapixels / self.seconds:.1f} MP/s" if self.written else ""
        return f"{self.manifest.parent}: {counts}{speed}"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run; every photo is whole or untouched. result: so far. signal: its number."""

    def __init__(self, result: EnhanceResult, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.result, self.signal = result, signal


@dataclass
class _Job:
    """A photo, the place of its result, and the line that becomes its in the manifest."""

    source: Path
    exposures: tuple[Path, ...]  # of a bracket, else the photo alone
    target: Path
    record: Record
    there: Collection[Path] = ()  # what is in the place of the result and its edit, and may be replaced


def enhance(
    paths: Iterable[str | Path],
    out_dir: str | Path,
    model: "nn.Module | ArrayLite | str | Path | None" = None,
    *,
    brackets: str = "off",
    property: bool = False,
    on_exists: str = "skip",
    shard: tuple[int, int] = (1, 1),
    jobs: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> EnhanceResult:
    """Enhances files, and the photos in folders and their subfolders, into out_dir, keeping names and subfolders.

    Each keeps its resolution, format, bit depth, colour space and what its file says, and appears whole or not at all. One that
    can't be read or written, or that needs more memory than there is, has failed; what may be a photo in a folder but is none of
    those read is skipped, and so may be one whose result exists. Both are listed with the reason; the others go on.

    The manifest in out_dir has a line of each photo (Record). By it a later run knows what was done before: a result that is as
    it was written, of the same photo (by their hashes), model and options. After anything, a kill too, the same call finishes
    the rest; what killed runs left is cleared.

    model: as Enhancer takes it. settings: what else it takes, such as device, strength, format or max_memory.
    save_edit: write each photo's edit beside its result, for a model that predicts one, as `lite` does: NAME.json, its curves,
    matrix and tilt (edits.Edit), and NAME.cube, all but the tilt as a look-up table of 33 x 33 x 33 that editors take; both
    in sRGB.
    brackets: "auto", "3" or "5": what bracket_sets takes for exposures of one picture, so many or 3, 5, 7 or 9, becomes one
    result, with the name of the middle one and all that its file says. Those that it can't tell are single photos, with a note.
    property: the photos of a folder of results are of one property: each edit is changed so that the photo's walls come nearer,
    in tint and lightness, to what the folder's become in the median (edits.of_property, edits.shared). Where another photo
    changes that, all of them are made anew.
    on_exists: what to do where a result exists that was not done before. "skip": what the manifest knows and nobody has changed
    since, but whose photo, model or options have changed, is made anew with a note; any other photo is skipped. "overwrite":
    everything is made anew, also what was done before. "rename": the result gets the first free name of NAME-1, NAME-2, ...
    "error": a UserError before any work.
    shard: (i, n), the i-th of n parts of the photos, sorted by their results' names: for n processes, each with its manifest.
    jobs: threads that read and encode photos while the model works on others, by default one a core. Beside the photo that the
    model has, 2 * jobs others are in memory at most, within a quarter of what is free. With max_memory on the CPU photos go one
    by one.

    UserError before any work: what Enhancer refuses; a path that does not exist, no photos, two photos of one output name, or
    two edits of one; an output that is one of the photos, an out_dir that can't be made; jobs or a shard out of range; a
    manifest that is none. Interrupted: Ctrl-C or SIGTERM came. The photo that the model was at is given up, those past it are
    written.
    """
    if on_exists not in ON_EXISTS:
        raise UserError(f"on_exists must be one of {', '.join(ON_EXISTS)}, got {on_exists!r}")
    if brackets not in BRACKETS:
        raise UserError(f"brackets must be one of {', '.join(BRACKETS)}, got {brackets!r}")
    if not 1 <= shard[0] <= shard[1]:
        raise UserError(f"shard must be from 1/N to N/N, got {shard[0]}/{shard[1]}")
    jobs = cores() if jobs is None else jobs
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    check_workers(jobs)
    started, out_dir = time.perf_counter(), Path(out_dir)
    enhancer = Enhancer(model, **settings)
    if property:
        enhancer.must_predict_edits("property")
    targets, passed_over = _find([Path(path) for path in paths], out_dir, enhancer.save_edit, enhancer.format)
    manifest, part = Manifest(out_dir, shard), slice(shard[0] - 1, None, shard[1])
    result = EnhanceResult(manifest.path)
    records = [Record(os.path.abspath(path), "", SKIPPED, reason) for path, reason in passed_over[part]]
    result.skipped += passed_over[part]
    for folder in {out_dir, *(target.parent for target in targets)}:
        clear_abandoned(folder)
    with ThreadPoolExecutor(jobs) as pool:
        sets, words = ({}, {}) if brackets == "off" else _gather(targets, brackets, pool)
        looks = _property_looks(targets, sets, enhancer, pool) if property else {}
        fates = _Fates(manifest.read(), targets, sets, words, looks, out_dir, enhancer.identity(), enhancer.save_edit, on_exists)
        found = list(pool.map(fates, sorted(targets)[part]))
    refused = [job for job in found if job.record.status == SKIPPED]
    if refused and on_exists == "error":
        raise UserError("\n  ".join([f"{len(refused)} results exist already", *(job.record.reason for job in refused[:9])]))
    result.skipped += [(job.source, job.record.reason) for job in refused]
    result.done_before += [job.target for job in found if job.record.status == WRITTEN]
    manifest.begin([*records, *(job.record for job in found if job.record.status != PENDING)])

    todo = [job for job in found if job.record.status == PENDING]
    on_cpu = enhancer.on_cpu
    budget = 0 if on_cpu and enhancer.max_memory is not None else free_bytes() // SHARE
    enhancer.reserved = budget if on_cpu and len(todo) > 1 else 0
    try:
        with deferred_signals("stopping ...") as signalled, Progress(len(todo), progress) as shown:
            stages = _Stages(enhancer, manifest, looks, signalled)
            flights = overlap(
                todo, stages.read, stages.run, stages.write, threads=jobs, cost=stages.bytes, budget=budget, stopped=signalled
            )
            with closing(flights):
                for job, outcome in flights:
                    _note(result, job, outcome)
                    manifest.add(job.record)
                    shown.step(job.record.megapixels)
    finally:
        manifest.end()
    result.seconds = time.perf_counter() - started
    if signalled() and len(result.written) + len(result.failed) < len(todo):
        raise Interrupted(result, signalled())
    return result


def _note(result: EnhanceResult, job: _Job, outcome: Record | Exception) -> None:
    """What became of a photo, in its record and in the result. Raises an error that is no fault of the photo."""
    record = job.record
    record.time = now()
    if not isinstance(outcome, Exception):
        record.status = WRITTEN
        result.written.append(job.target)
        result.notes += [(job.source, note) for note in record.warnings]
        result.megapixels += record.megapixels
        return
    if isinstance(outcome, OSError):
        record.reason = f"cannot write {job.target}: {outcome.strerror or outcome}"
    else:
        record.reason = failure(outcome, job.source)
    record.status, record.warnings, record.result_sha256 = FAILED, [], ""
    result.failed.append((job.source, record.reason))


@dataclass
class _Stages:
    """What happens to a photo: `run` in the main thread, the others in theirs."""

    enhancer: Enhancer
    manifest: Manifest
    looks: Mapping[Path, Array]  # of a folder of results, its property's: edits.of_property
    signalled: Deferred

    def bytes(self, job: _Job) -> int:
        """What it takes while it waits."""
        try:
            height, width, bits = photo_layout(job.source)
        except UserError:  # it will fail
            return 0
        several = len(job.exposures) > 1
        copies = COPIES * (bits // 8 if self.enhancer.as_stored and not several else 4)
        return height * width * 3 * (copies + several * len(job.exposures) * bits // 8)

    def read(self, job: _Job) -> tuple[_Job, Work]:
        started = time.perf_counter()
        job.record.source_sha256, job.record.exposures = _hashes(job.exposures)
        work = self.enhancer.read(*job.exposures)
        work.look = self.looks.get(job.target.parent)
        job.record.seconds += time.perf_counter() - started
        return job, work

    def run(self, flight: tuple[_Job, Work]) -> tuple[_Job, Work] | None:
        job, work = flight
        started = time.perf_counter()
        try:
            with self.signalled.abandoning():
                self.enhancer.run(work)
        except Abandoned:
            return None
        job.record.seconds += time.perf_counter() - started
        return job, work

    def write(self, flight: tuple[_Job, Work]) -> Record:
        job, work = flight
        started, record = time.perf_counter(), job.record
        encoded = self.enhancer.encode(work)
        record.result_sha256 = hashlib.sha256(encoded).hexdigest()
        record.megapixels = work.photo.pixels.shape[0] * work.photo.pixels.shape[1] / 1e6
        record.warnings += work.photo.notes
        texts = edit_files(work.edit, self.enhancer.strength) if work.edit else {}
        edits = {job.target.with_suffix(suffix): text for suffix, text in texts.items()}
        record.edits = {path.name: hashlib.sha256(text.encode()).hexdigest() for path, text in edits.items()}
        for path in (job.target, *edits):
            if path not in job.there and os.path.lexists(path):
                raise UserError(f"{path} has appeared meanwhile")
        job.target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(job.target) as part:
            part.write_bytes(encoded)
            self.manifest.claim(record)
            for path, text in edits.items():
                write_text(path, text)
        record.seconds += time.perf_counter() - started
        return record


@dataclass
class _Fates:
    """Whether a photo is done (WRITTEN), to be done (PENDING) or left alone (SKIPPED), and where its result is."""

    known: Mapping[str, Record]
    targets: Mapping[Path, Path]  # of each result, the photo
    sets: Mapping[Path, tuple[Path, ...]]  # of a photo, the exposures of its bracket
    words: Mapping[Path, str]  # on a photo that may be of a bracket
    looks: Mapping[Path, Array]  # of a folder of results, its property's: edits.of_property
    out_dir: Path
    identity: Mapping[str, Any]
    save_edit: bool
    on_exists: str

    def __post_init__(self) -> None:
        self.stems = {target.with_suffix("") for target in self.targets}

    def __call__(self, target: Path) -> _Job:
        source, reason = self.targets[target], ""
        exposures, identity = self.sets.get(source, (source,)), self._identity(target)
        for place in self._places(target):
            name = str(place.relative_to(self.out_dir))
            record = Record(os.path.abspath(source), name, PENDING, **identity)
            record.warnings += [self.words[source]] if source in self.words else []
            edits = [place.with_suffix(suffix) for suffix in EDIT_SUFFIXES if self.save_edit]
            hashes = {path: _sha256(path) for path in (place, *edits) if os.path.lexists(path)}
            record.replaced_sha256 = there = hashes.get(place, "")
            record.replaced_edits = {path.name: hashes[path] for path in edits if path in hashes}
            job, line = _Job(source, exposures, place, record, hashes), self.known.get(name)
            foreign = [path for path in edits if path in hashes and not (line and line.has_edit(path.name, hashes[path]))]
            reason = f"{(foreign or [place])[0]} exists already and is not what a manifest says of this photo"
            if self.on_exists == "overwrite" or place not in hashes and not foreign:
                return job
            if line and there and line.status in (WRITTEN, PENDING) and there == line.result_sha256:
                changed = self._changed(exposures, line, identity)
                changed += ["the edit beside it"] if not changed and set(edits) - set(hashes) else []
                if not changed:
                    return _Job(source, exposures, place, replace(line, status=WRITTEN))
                if not foreign:
                    reason = f"{place} exists already, and since it was made, changed: {', '.join(changed)}"
                if self.on_exists == "skip" and not foreign:
                    record.warnings.append(f"made anew: since its result was made, changed: {', '.join(changed)}")
                    return job
            elif line and there and line.status in (PENDING, FAILED) and there == line.replaced_sha256 and not foreign:
                return job  # it was to be replaced
            if self.on_exists != "rename":
                break
        record = Record(os.path.abspath(source), str(target.relative_to(self.out_dir)), SKIPPED, reason)
        return _Job(source, exposures, target, record)

    def _places(self, target: Path) -> Iterator[Path]:
        yield target
        for number in count(1):
            place = target.with_stem(f"{target.stem}-{number}")
            if place not in self.targets and not (self.save_edit and place.with_suffix("") in self.stems):
                yield place

    def _identity(self, target: Path) -> dict[str, Any]:
        """With the look of its property, as a colour."""
        look = self.looks.get(target.parent)
        colour = None if look is None else "#" + "".join(f"{round(255 * channel):02x}" for channel in look.tolist())
        return {**self.identity, "options": {**self.identity["options"], "property": colour}}

    def _changed(self, exposures: tuple[Path, ...], line: Record, identity: Mapping[str, Any]) -> list[str]:
        same = {"the model": line.model == identity["model"], "the options": line.options == identity["options"]}
        photo, bracket = _hashes(exposures)
        same |= {"the photo": line.source_sha256 == photo, "its bracket": line.exposures == bracket}
        return [what for what, same in same.items() if not same]


def _sha256(path: Path) -> str:
    """Of a file, as hexadecimal digits; empty where it can't be read."""
    try:
        return sha256(path)
    except OSError:
        return ""


def _hashes(exposures: tuple[Path, ...]) -> tuple[str, dict[str, str]]:
    """What a Record has of a photo, or of a bracket whose middle one it is: source_sha256 and exposures."""
    hashes = {os.path.abspath(path): _sha256(path) for path in exposures}
    return hashes[os.path.abspath(exposures[len(exposures) // 2])], hashes if len(exposures) > 1 else {}


def _gather(targets: dict[Path, Path], brackets: str, pool: Executor) -> tuple[dict[Path, tuple[Path, ...]], dict[Path, str]]:
    """The sets of exposures, by the middle one, the others' targets being dropped, and what is to be said of other photos."""
    found, words = bracket_sets(set(targets.values()), None if brackets == "auto" else int(brackets), pool)
    sets = {paths[len(paths) // 2]: paths for paths in found}
    others = {path for middle, paths in sets.items() for path in paths if path != middle}
    for target in [target for target, source in targets.items() if source in others]:
        del targets[target]
    return sets, words


def _property_looks(
    targets: Mapping[Path, Path], sets: Mapping[Path, tuple[Path, ...]], enhancer: Enhancer, pool: Executor
) -> dict[Path, Array]:
    """Of each folder of results, where there is one."""
    places = sorted(targets)
    predictions = pool.map(enhancer.glimpse, [sets.get(targets[place], (targets[place],)) for place in places])
    by_folder: dict[Path, list[Prediction]] = {}
    for place, prediction in zip(places, predictions, strict=True):
        by_folder.setdefault(place.parent, []).extend([prediction] if prediction else [])
    return {folder: look for folder, predicted in by_folder.items() if (look := of_property(predicted)) is not None}


def _find(paths: list[Path], out_dir: Path, save_edit: bool, format: str) -> tuple[dict[Path, Path], list[tuple[Path, str]]]:
    """Output of each photo -> the photo; and what is passed over, with the reason. Creates out_dir once all else is right."""
    targets: dict[Path, Path] = {}
    passed_over: list[tuple[Path, str]] = []
    edits: dict[Path, Path] = {}
    photos = [photo for path in paths for photo in _photos(path, out_dir, passed_over)]
    of_name: dict[Path, set[Path]] = {}
    for source, relative in photos:
        of_name.setdefault(result_name(relative, format), set()).add(source.resolve())
    for source, relative in photos:
        name = result_name(relative, format)
        if name != relative and len(of_name[name]) > 1:  # as IMG_1.cr2 beside IMG_1.jpg: IMG_1.cr2.jpg
            name = relative.with_name(relative.name + name.suffix)
        target = out_dir / name
        other = targets.setdefault(target, source)
        if other.resolve() != source.resolve():
            raise UserError(f"{other} and {source} would both become {target}: enhance them into different folders")
        if save_edit and (other := edits.setdefault(target.with_suffix(""), target)) != target:
            raise UserError(f"{other} and {target} would have their edits in one file: enhance them into different folders")
    if not targets and not passed_over:
        raise UserError(f"expected photos ({KINDS}), got none in {', '.join(map(str, paths)) or 'no paths'}")
    sources = {source.resolve() for source in targets.values()}
    for target in targets:
        if target.resolve() in sources:
            raise UserError(f"{target} is one of the photos to enhance and would be overwritten: choose another folder")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir}: the output folder cannot be created: {error.strerror}") from error
    if not os.access(out_dir, os.W_OK):
        raise UserError(f"{out_dir}: the output folder cannot be written to")
    return targets, sorted(passed_over)


def _photos(path: Path, out_dir: Path, passed_over: list[tuple[Path, str]]) -> list[tuple[Path, Path]]:
    """The photos that a path stands for, each with its place below out_dir, which is not searched itself."""
    if not path.exists():
        raise UserError(f"{path}: expected a photo or a folder, got a path that does not exist")
    if not path.is_dir():
        return [(path, Path(path.name))]
    photos, others = photos_in(path, out_dir)
    passed_over += [other for other in others if other not in passed_over]
    return [(photo, photo.relative_to(path)) for photo in photos]
