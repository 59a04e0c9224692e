"""What `make compare` found of each family of models and its forms, as results/families.json: the README's table is made of it.

    python benchmarks/families.py demo_train_run/compare/compare.json [--out results/families.json]

`autohdr compare` measured them in one run on this machine; the figures of single photos stay in its page.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from run import RESULTS, commit, describe, write

KEPT = ("name", "form_of", "parameters", "file_bytes", "macs_per_megapixel", "seconds_per_megapixel", "bytes_per_megapixel")
KEPT += ("joules_per_megapixel", "score", "pareto", "figures", "difference")


def rows(compared: dict[str, Any]) -> list[dict[str, Any]]:
    """Of what `autohdr compare` writes, each method's figures; of a model its configuration's name, not its file's."""
    methods = {name: {"method": name} | method for name, method in compared["methods"].items()}
    return [{key: method[key] for key in ("method", *KEPT) if key in method} for method in methods.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "families.json")
    options = parser.parse_args()
    compared = json.loads(options.compared.read_text())
    image, (height, width) = compared["images"][0], compared["settings"]["cost_size"]
    found = {"pairs": f"{len(compared['images'])} photos of {image['width']}×{image['height']}", "photo": f"{width}×{height}"}
    results = describe(commit(), rows(compared), None)
    del results["backends"]
    results["machine"]["threads"] = compared["environment"]["threads"]
    write(results | found | {"date": compared["date"]}, options.out)


if __name__ == "__main__":
    main()
