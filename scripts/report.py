"""Tables, plots and a page from finished runs: python scripts/report.py RUN_OR_FOLDER...

Reads stored predictions only. Writes report.html, tables.md, tables.tex, tables.csv and plots (PNG,
PDF) to --out, prints the main table, and lists what it had to leave out. Exit code 2: no finished
run, or a wrong call.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args import Args, Parser, count, positive_int, seed
from utils.commit import current_commit
from utils.errors import RunError, UsageError
from utils.report.collect import Options, collect
from utils.report.runs import find_runs
from utils.report.tables import terminal
from utils.report.write import check_writable, write


def parse_args(argv: list[str]) -> Args:
    """The flags; `--out` by default lies in the folder given, or what several have in common."""
    parser = Parser(prog="report.py", description=__doc__)
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[Path("checkpoints")], metavar="RUN_OR_FOLDER"
    )
    parser.add_argument("--out", type=Path, help="default: report/ in their common folder")
    parser.add_argument("--num-bins", type=positive_int, default=15, help="bins of the ECE")
    parser.add_argument("--bootstrap", type=count, default=1000, help="resamples; 0: no intervals")
    parser.add_argument("--seed", type=seed, default=0, help="of the resamples")
    args = parser.parse_args(argv)
    if args.out is None:
        above = os.path.commonpath([os.path.abspath(folder) for folder in args.folders])
        args.out = Path(os.path.relpath(above)) / "report"
    return args


def main(argv: list[str]) -> None:
    """Find, measure, write, tell.

    Raises:
        UsageError: a wrong call, or nothing to report on.
        RunError: a file cannot be written.
    """
    args = parse_args(argv)
    runs, skipped = find_runs(args.folders)
    if runs:
        check_writable(args.out)

    def progress(run: str) -> None:
        print(f"\r\033[K{run}", end="", file=sys.stderr, flush=True)

    quiet = not sys.stderr.isatty()
    options = Options(args.num_bins, args.bootstrap, args.seed)
    report = collect(runs, skipped, options, (lambda run: None) if quiet else progress)
    if not quiet and runs:
        print("\r\033[K", end="", file=sys.stderr)
    for item in report.skipped:
        print(f"{item.path}: skipped: {item.reason}", file=sys.stderr)
    for note in report.notes:
        print(note, file=sys.stderr)
    if not report.families:
        names = " ".join(map(str, args.folders))
        raise UsageError(
            f"no finished run with predictions under: {names}. A run is finished when its folder "
            "has metrics.json; give other folders, or finish a run first."
        )
    made = {
        "command": shlex.join(["python", "scripts/report.py", *argv]),
        "commit": current_commit() or "unknown",
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    file = write(report, args.out, made)
    print(terminal(report))
    print(f"\nReport: {file} (tables.md, tables.tex, tables.csv and plots beside it)")


def run(argv: list[str] | None = None) -> int:
    """`main` for the command line: messages without a traceback, and an exit code."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (UsageError, RunError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
