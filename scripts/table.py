"""Print the metrics of finished runs as a table: python scripts/table.py RUN_OR_FOLDER..."""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = ("method", "model", "data set", "n", "draws", "ACC", "ECE", "NLL", "Brier", "train s")


def rows(folder: Path) -> list[tuple[str, ...]]:
    """One row per evaluated data set of every run under `folder`."""
    found = []
    for file in sorted(folder.rglob("metrics.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        for name, block in run["datasets"].items():
            numbers = [f"{block[key]:.3f}" for key in ("acc", "ece", "nll", "brier")]
            counts = [str(block.get("n_examples", "?")), str(block.get("n_draws", "?"))]
            seconds = f"{run['training_seconds']:.0f}"
            found.append((run["modelwrapper"], run["model"], name, *counts, *numbers, seconds))
    return found


def main(folders: list[str]) -> int:
    table = [row for folder in folders for row in rows(Path(folder))]
    if not table:
        print(f"No finished run (no metrics.json) under: {' '.join(folders)}", file=sys.stderr)
        return 2
    widths = [max(len(row[i]) for row in [COLUMNS, *table]) for i in range(len(COLUMNS))]
    for row in [COLUMNS, tuple("-" * width for width in widths), *table]:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["checkpoints"]))
