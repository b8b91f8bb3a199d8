"""Tables, plots and a page from finished runs: python scripts/report.py RUN_OR_FOLDER...

Reads stored predictions only. Writes report.html, tables.md, tables.tex, tables.csv and plots (PNG,
PDF) to --out, prints the main table, and lists what it had to leave out. Exit code 2: no finished
run, or a wrong call.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from decisions.conformal import SCORES
from report.collect import Options, collect
from report.decided import Asked
from report.escape import shorten
from report.runs import find_runs
from report.seeds import seeds_table
from report.tables import terminal
from report.write import check_writable, write
from utils.args import Args, Parser, add_switch, count, positive_int, seed, share
from utils.commit import current_commit
from utils.errors import RunError, UsageError, one_line, quoted
from utils.logging import writable

MOST_BINS = 1000
MOST_RESAMPLES = 100_000
MOST_LEVELS = 20  # coverages, or risks


def folder(text: str) -> Path:
    """A path; an empty one is a variable that was not set, not the working directory."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no folder")
    return Path(text)


def parse_args(argv: list[str]) -> Args:
    """The flags; `--out` by default lies in the folder given, or what several have in common."""
    parser = Parser(prog="report.py", description=__doc__)
    parser.add_argument(
        "folders", nargs="*", type=folder, default=[Path("checkpoints")], metavar="RUN_OR_FOLDER"
    )
    parser.add_argument("--out", type=folder, help="default: report/ in their common folder")
    parser.add_argument("--num-bins", type=positive_int, default=15, help="bins of the ECE")
    parser.add_argument("--bootstrap", type=count, default=1000, help="resamples; 0: no intervals")
    parser.add_argument("--seed", type=seed, default=0, help="of the resamples")
    add_switch(
        parser,
        "--by-seed",
        help="also print for how many seeds each row is better than the baseline",
    )
    asked = Asked()
    sets = parser.add_argument_group("sets and selective answers (runs with --calibrate)")
    sets.add_argument(
        "--coverage", nargs="+", type=share, default=asked.coverages, help="of sets, such as 0.9"
    )
    sets.add_argument("--set-score", choices=SCORES, default=asked.set_score)
    sets.add_argument(
        "--max-risk",
        nargs="+",
        type=share,
        default=asked.max_risks,
        help="the share of wrong ones among the answered",
    )
    sets.add_argument(
        "--confidence", type=share, default=asked.confidence, help="with which --max-risk holds"
    )
    args = parser.parse_args(argv)
    for flag, values in (("--coverage", args.coverage), ("--max-risk", args.max_risk)):
        if len(values) > MOST_LEVELS:
            raise UsageError(f"{flag} has {len(values)} values; at most {MOST_LEVELS} are shown.")
    for flag, value, most in (
        ("--num-bins", args.num_bins, MOST_BINS),
        ("--bootstrap", args.bootstrap, MOST_RESAMPLES),
    ):
        if value > most:
            raise UsageError(f"{flag} is {quoted(value)}; at most {most} are possible.")
    if args.out is None:
        try:
            common = os.path.commonpath([os.path.abspath(path) for path in args.folders])
            args.out = Path(os.path.relpath(common)) / "report"
        except OSError as error:
            raise UsageError(
                f"the working directory cannot be read ({error.strerror}); pass --out."
            ) from None
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
        _say(f"\r\033[K{shorten(run)}", sys.stderr, end="")

    quiet = not sys.stderr.isatty()
    asked = Asked(
        tuple(sorted(set(args.coverage))),
        args.set_score,
        tuple(sorted(set(args.max_risk))),
        args.confidence,
    )
    options = Options(args.num_bins, args.bootstrap, args.seed, asked)
    report = collect(runs, skipped, options, (lambda run: None) if quiet else progress)
    if not quiet and runs:
        _say("\r\033[K", sys.stderr, end="")
    for item in report.skipped:
        _say(item.line, sys.stderr)
    for note in report.notes:
        _say(one_line(note), sys.stderr)
    if not report.families:
        names = " ".join(quoted(str(path)) for path in args.folders)
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
    _say(terminal(report))
    if args.by_seed:
        _say(f"\n{seeds_table(report)}")
    _say(f"\nReport: {one_line(str(file))} (tables.md, tables.tex, tables.csv and plots beside it)")


def _say(text: str, stream=None, end: str = "\n") -> None:
    """To a terminal, which may know few letters."""
    stream = stream or sys.stdout
    print(writable(text, stream), file=stream, end=end, flush=True)


def run(argv: list[str] | None = None) -> int:
    """`main` for the command line: messages without a traceback, and an exit code."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (UsageError, RunError) as error:
        _say(f"{type(error).__name__}: {error}", sys.stderr)
        return error.exit_code
    except MemoryError:
        _say(
            "RunError: the memory is full; report on fewer runs or with fewer resamples.",
            sys.stderr,
        )
        return RunError.exit_code
    except BrokenPipeError:  # nobody reads the table any more; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else exit tries once more
        return RunError.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
