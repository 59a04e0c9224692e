"""Enhance a folder of photos, or s3://bucket/prefix, on a Ray cluster: results, and a manifest of what became of each.

    python examples/ray_enhance.py s3://bucket/photos --out s3://bucket/enhanced

Source and results are places that fsspec knows and that all nodes see: folders, s3:// (with s3fs), gs:// (with gcsfs), ... Needs
`pip install "ray[data]"`; without RAY_ADDRESS it starts a cluster on this machine. Each process has one model. What a node that
dies was at, others do again. OUT is for results alone: the same call again leaves those that OUT/autohdr.jsonl has as written by
the same model and options, and makes all others. What does not end as a photo's name does is passed over.
"""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

import fsspec
import ray.data

from autohdr.data.conversion import result_name
from autohdr.data.images import SUFFIXES
from autohdr.edits import SHIPPED
from autohdr.enhance import Enhancer
from autohdr.enhance.manifest import FAILED, WRITTEN, Record
from autohdr.errors import UserError

MOST_TASKS = 2000


def photos_in(source: str, out: str) -> dict[str, str]:
    """Each photo's path -> its result's, relative to the places that hold them. Results are no sources."""
    (files, root), (_, folder) = fsspec.url_to_fs(source), fsspec.url_to_fs(out)
    if root == folder:
        raise UserError(f"expected another place for the results than {source}, where the photos are")
    photos = [path for path in files.find(root) if Path(path).suffix.lower() in SUFFIXES and not path.startswith(f"{folder}/")]
    names = [path.removeprefix(root).lstrip("/") for path in photos]
    results = {name: str(result_name(Path(name))) for name in names}
    taken = Counter(results.values())
    for name, result in results.items():
        if taken[result] > 1 and result != name:  # as IMG_1.cr2 beside IMG_1.jpg: IMG_1.cr2.jpg
            results[name] = name + Path(result).suffix
    return results


def done(name: str, result: str, enhancer: Enhancer, source: str, out: str) -> Record:
    """Reads a photo, enhances it, writes its result whole, and says what became of it."""
    (files, root), (results, folder) = fsspec.url_to_fs(source), fsspec.url_to_fs(out)
    record = Record(f"{source.rstrip('/')}/{name}", result, FAILED, **enhancer.identity())
    try:
        photo = files.cat_file(f"{root}/{name}")
        enhanced, record.warnings, record.reason = enhancer.file(photo)
        if not record.reason:
            results.makedirs(f"{folder}/{result}".rpartition("/")[0], exist_ok=True)
            with results.transaction, results.open(f"{folder}/{result}", "wb") as file:
                file.write(enhanced)
            record.status = WRITTEN
            record.source_sha256, record.result_sha256 = (hashlib.sha256(data).hexdigest() for data in (photo, enhanced))
    except OSError as error:
        record.reason = str(error)
    return record


def work(batch: dict, **given) -> dict:
    """A task of the cluster."""
    pairs = zip(batch["name"], batch["result"], strict=True)
    return {"record": [done(str(name), str(result), **given).line() for name, result in pairs]}


def enhance(source: str, out: str, enhancer: Enhancer) -> list[Record]:
    """Does what is left to do, and returns the manifest's lines."""
    results, folder = fsspec.url_to_fs(out)
    manifest, known = f"{folder}/autohdr.jsonl", {}
    if results.exists(manifest):
        lines = [Record(**json.loads(line)) for line in results.cat_file(manifest).splitlines()]
        known = {line.result: line for line in lines if results.exists(f"{folder}/{line.result}")}
    identity = {"status": WRITTEN, **enhancer.identity()}
    known = {name: line for name, line in known.items() if identity.items() <= vars(line).items()}
    photos = photos_in(source, out)
    if not photos:
        raise UserError(f"expected photos in {source}, got none")
    left = [{"name": name, "result": result} for name, result in photos.items() if result not in known]
    gpus = 0 if enhancer.on_cpu else 1
    try:
        if left:
            rows = ray.data.from_items(left, override_num_blocks=min(len(left), MOST_TASKS))
            given = {"enhancer": enhancer, "source": source, "out": out}
            for row in rows.map_batches(work, fn_kwargs=given, batch_size=1, num_gpus=gpus).iter_rows():
                record = Record(**json.loads(row["record"]))
                known[record.result] = record
    finally:
        results.makedirs(folder, exist_ok=True)
        results.pipe_file(manifest, b"".join(known[result].line() for result in sorted(known)))
    return list(known.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder or URL of photos")
    parser.add_argument("--out", required=True, help="folder or URL for the results")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--device", default="cpu", help="cuda: one GPU a process")
    args = parser.parse_args()
    records = enhance(args.source, args.out, Enhancer(args.checkpoint, device=args.device, strength=args.strength))
    for record in records:
        for text in [record.reason] if record.reason else record.warnings:
            print(f"{'failed ' if record.reason else ''}{record.source}: {text}")
    failed = sum(record.status == FAILED for record in records)
    print(f"{args.out}: {len(records) - failed} written, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:  # bad input, in words for whoever gave it
        raise SystemExit(f"ray_enhance: {error}") from None
