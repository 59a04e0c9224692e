"""What became of each photo of a folder of results, a line of JSON each: what a run that goes on goes by."""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autohdr.errors import UserError
from autohdr.files import append, replacing

PENDING, WRITTEN, SKIPPED, FAILED = "pending", "written", "skipped", "failed"


def now() -> str:
    """The time as a Record has it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass
class Record:
    """A line of a manifest.

    source: the photo's absolute path. result: that of its result, relative to the manifest's folder; empty where none would be.
    status: "written", "skipped" or "failed"; or "pending": about to be put in its place. After a kill it may be there or not.
    reason: for skipped and failed ones. warnings: what is not as it was.
    source_sha256, result_sha256, replaced_sha256: of the photo, of its result and of what was in the result's place before, as
    hexadecimal digits; empty where there is none. edits, replaced_edits: the same of the edit beside the result, by its files'
    names. model: its name, and the SHA-256 of its weights.
    options: what else a result depends on. exposures: of a bracket, whose middle one the photo is, the absolute path of each and
    its SHA-256. megapixels, seconds: of this photo, its three stages added up. time: of the line, UTC.
    """

    source: str
    result: str
    status: str
    reason: str = ""
    warnings: list[str] = field(default_factory=list)
    source_sha256: str = ""
    result_sha256: str = ""
    replaced_sha256: str = ""
    edits: dict[str, str] = field(default_factory=dict)
    replaced_edits: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    exposures: dict[str, str] = field(default_factory=dict)
    megapixels: float = 0.0
    seconds: float = 0.0
    time: str = field(default_factory=now)

    @property
    def photo(self) -> str:
        """What a manifest has one line of."""
        return self.result or self.source

    def has_edit(self, name: str, sha256: str) -> bool:
        """Whether a file of the edit is what this line says, or what was to be replaced."""
        return bool(sha256) and sha256 in (self.edits.get(name), self.replaced_edits.get(name))

    def line(self) -> bytes:
        """A name that is not UTF-8 has lone surrogates, which become \\udcXX: JSON reads that as the same name."""
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


class Manifest:
    """The manifests of a folder, of which one is this run's: autohdr.jsonl, or autohdr.I-of-N.jsonl of a shard.

    Each shard has a file of its own, since not every network file system lets several machines append to one. A run that is no
    shard takes over the lines of all. Where files can be locked, several runs may write at once. UserError for a file of
    something else.
    """

    def __init__(self, folder: Path, shard: tuple[int, int] = (1, 1)):
        self.folder = folder
        self.path = folder / ("autohdr.jsonl" if shard[1] == 1 else f"autohdr.{shard[0]}-of-{shard[1]}.jsonl")
        self._takes_over, self._own = shard[1] == 1, dict[str, Record]()

    def read(self) -> dict[str, Record]:
        """The newest line of each photo, in all manifests of the folder."""
        return _newest(self._files())

    def begin(self, records: Iterable[Record]) -> None:
        """Makes these the lines of their photos, all at once or none."""
        self._own = {record.photo: record for record in records}
        self._rewrite(self._files() if self._takes_over else [])

    def claim(self, record: Record) -> None:
        """Says, before a result is put in its place, that it is this run's: a kill between that and `add` leaves no doubt.

        OSError where it can't be said.
        """
        self._append(replace(record, time=now()), durable=True)

    def add(self, record: Record) -> None:
        """Makes this the line of its photo. Where the disk is full, that is left to `end`."""
        self._own[record.photo] = record
        with suppress(OSError):
            self._append(record)

    def _append(self, record: Record, durable: bool = False) -> None:
        with _locked(self.folder):
            append(self.path, record.line(), durable)

    def end(self) -> None:
        """Leaves one line a photo, in the order of their results."""
        self._rewrite([])

    def _rewrite(self, others: list[Path]) -> None:
        """With the lines of others, which go."""
        with _locked(self.folder):
            records = _newest({self.path, *others}) | self._own
            with replacing(self.path) as part:
                part.write_bytes(b"".join(records[photo].line() for photo in sorted(records, key=Path)))
            for path in others:
                if path != self.path:
                    path.unlink()

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("autohdr*.jsonl") if re.fullmatch(r"autohdr(\.\d+-of-\d+)?\.jsonl", path.name)]


def _newest(files: Iterable[Path]) -> dict[str, Record]:
    newest: dict[str, Record] = {}
    for path in files:
        for photo, record in _read(path).items():
            if photo not in newest or newest[photo].time < record.time:
                newest[photo] = record
    return newest


def _read(path: Path) -> dict[str, Record]:
    """The last line of each photo. What a kill cut short, behind the last line feed, is none."""
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = Record(**json.loads(line))
            records[record.photo] = record
        except (ValueError, TypeError) as error:
            got = f"got {line[:80]!r} ({error})"
            raise UserError(f"{path}:{number}: expected a line of a manifest of autohdr enhance, {got}") from None
    return records


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other process is in such a block for this folder, where its file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
