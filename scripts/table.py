"""Print the metrics of finished runs as a table: python scripts/table.py [--mean] RUN_OR_FOLDER...

--mean puts runs that differ in their seed only into one row, mean ± standard deviation.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

METRICS = ("acc", "ece", "nll", "brier")
COLUMNS = ("run", "model", "data set", "n", "draws", "ACC", "ECE", "NLL", "Brier", "seeds")


def blocks(folder: Path) -> list[tuple[tuple[str, ...], dict[str, float]]]:
    """((run, model, data set, n, draws), metrics) of every evaluation of every run under `folder`.

    A run is named by its method and its folder without the seed. Metrics after temperature scaling
    are a row of their own.
    """
    found = []
    for file in sorted(folder.rglob("metrics.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        name = re.sub(r"-?seed\d+", "", file.parent.name)
        method = run["modelwrapper"]
        label = name if name.startswith(method) else f"{method} {name}".strip()
        for dataset, block in run["datasets"].items():
            counts = (str(block.get("n_examples", "?")), str(block.get("n_draws", "?")))
            found.append(((label, run["model"], dataset, *counts), block))
            if "temperature_scaled" in block:
                scaled = block["temperature_scaled"]
                found.append(((f"{label} (scaled)", run["model"], dataset, *counts), scaled))
    return found


def table(folders: list[Path], mean: bool) -> list[tuple[str, ...]]:
    """Rows of text."""
    found = [block for folder in folders for block in blocks(folder)]
    if not mean:
        return [(*key, *(f"{b[m]:.3f}" for m in METRICS), "1") for key, b in found]
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for key, block in found:
        groups.setdefault(key, []).append(block)
    rows = []
    for key, members in sorted(
        groups.items(), key=lambda item: (item[0][2] != "bbc_headlines", item[0])
    ):
        cells = []
        for metric in METRICS:
            values = [member[metric] for member in members]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        rows.append((*key, *cells, str(len(members))))
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mean", action="store_true", help="mean and spread over seeds")
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("checkpoints")])
    args = parser.parse_args(argv)
    rows = table(args.folders, args.mean)
    if not rows:
        names = " ".join(map(str, args.folders))
        print(f"No finished run (no metrics.json) under: {names}", file=sys.stderr)
        return 2
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    for row in [COLUMNS, tuple("-" * width for width in widths), *rows]:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
