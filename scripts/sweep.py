"""Choose hyper-parameters on rows held out of training: any grid or list of flags.

    python scripts/sweep.py --out FOLDER --grid lr=1e-4,3e-4,1e-3 --grid lora-r=4,8 \\
        --seeds 1 2 --rank-by nll -- [flags of main.py: method, model, data set, length, ...]

Every candidate and seed is a run of main.py in a process of its own, which is evaluated on the
held-out part of its training set (--testing-set train_val): the test rows are never looked at. A
finished run is skipped, an interrupted one resumed, a failed one recorded. Where the machine ends a
run (a signal, a full disk), or another run writes to its folder, the sweep stops and nothing is
ranked: that says nothing about the candidate. The end is a ranking in FOLDER/sweep.md and
sweep.csv, and FOLDER/best.json; `--best FOLDER --grid ...` prints the best candidate's
flags, one a line.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as program
import modelwrappers
from report.ranking import SCORES, Ranked, comma_separated, markdown, rank, score_run, terminal
from utils.args import SPLIT_FLAGS, Args, Parser, add_switch, build_parser, seed
from utils.candidates import Candidate, candidates_of, flags_of
from utils.errors import RunError, UsageError, printable, quoted
from utils.files import sweep_temporaries, write_atomically, write_json
from utils.flags import spelling
from utils.logging import logger, writable
from utils.parser import folded
from utils.program import run_script
from utils.records import Count, Name, Record, read_record
from utils.row_output import check_place
from utils.run_paths import run_folder_path
from utils.run_records import ARGS_FILE, METRICS_FILE, differences, read_run_record, stored_flags

SETTINGS_FILE, BEST_FILE = "sweep.json", "best.json"
MADE = ("sweep.md", "sweep.csv", BEST_FILE)
MAIN = Path(program.__file__).resolve()

# Flags of main.py that the sweep decides itself, and why.
NOT_TAKEN = {
    **dict.fromkeys(("seed", "seed_data", "seed_sampling"), "each of --seeds has its own"),
    "testing_set": "candidates are compared on rows held out of training, never on test rows",
    "hold_out": "rows are always held out; --held-out-fraction says how many",
    **dict.fromkeys(
        ("ood_datasets", "ood_ori_dataset"), "shifted rows are test rows; evaluate the best on them"
    ),
    **dict.fromkeys(
        ("temperature_scaling", "calibrate"),
        "it would be fitted on the rows that the candidates are compared on",
    ),
    "config": "a stored run has rows and seeds of its own; pass the flags themselves",
    **dict.fromkeys(("output_dir", "log_path", "checkpoint_name"), "results lie in --out"),
    **dict.fromkeys(("resume", "overwrite"), "it is a flag of the sweep, before the `--`"),
}
# Where one of these differs, other rows are held out or scored.
SAME_ROWS = ("dataset", *SPLIT_FLAGS, "label_column", "limit_eval")
# How messages begin that are about the machine or another run, not about the candidate: those of
# `RunFolder`, `utils.files`, `RunHistory` and `utils.program`.
NOT_ITS_OWN = re.compile(
    r"UsageError: (another run is writing to|the output folder .* cannot be written)"
    r"|RunError: (cannot write|the disk is full)"
)


class Run(NamedTuple):
    """A candidate with a seed.

    Attributes:
        words: main.py's command line.
        args: what main.py makes of it.
        folder: where it is kept.
    """

    candidate: Candidate
    seed: int
    words: list[str]
    args: Args
    folder: Path

    @property
    def state(self) -> str:
        """Finished, begun, or to do."""
        if (self.folder / METRICS_FILE).is_file():
            return "finished"
        return "begun" if (self.folder / ARGS_FILE).is_file() else "to do"


class Best(Record):
    """best.json: the best candidate, for whoever knows the candidates.

    Attributes:
        words: its flags; `--best` prints them only as the call's own candidate that they equal.
        ranked_by: the score.
        seeds: of its runs.
    """

    words: list[Name]
    ranked_by: Name
    seeds: list[Count]


class Ended(NamedTuple):
    """How a process came to its end: its exit code (negative: a signal's number) and last words."""

    code: int
    told: str


# --- flags ----------------------------------------------------------------------------------------


def build_own_parser() -> Parser:
    """The sweep's own flags."""
    parser = Parser(
        prog="sweep.py",
        description=__doc__,
        epilog="What follows `--` are flags of main.py: `python main.py --help` lists them. In the "
        "value of --load-lora-path, {seed} stands for the run's seed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="FOLDER", help="where runs and ranking lie")
    parser.add_argument(
        "--best", metavar="FOLDER", help="only print the flags that the sweep there has chosen"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="FLAG=V1,V2",
        help="values of a flag; every combination is tried",
    )
    parser.add_argument(
        "--list", metavar="FILE", help="a line of flags for each candidate, with every combination"
    )
    parser.add_argument("--seeds", nargs="+", type=seed, default=[1], help="of every candidate")
    parser.add_argument(
        "--rank-by", "--score", dest="rank_by", choices=SCORES, default="nll", help="default: nll"
    )
    add_switch(parser, "--resume", help="go on with a sweep, which may have new candidates")
    add_switch(parser, "--dry-run", help="only list the runs")
    return parser


def parse_args(argv: list[str]) -> tuple[Args, list[str]]:
    """The sweep's own flags, and main.py's, which follow `--`.

    Raises:
        UsageError: a broken rule.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    own, words = argv[:end], argv[end + 1 :]
    parser = build_own_parser()
    args, unknown = parser.parse_known_args(own, Args())
    if unknown:
        raise UsageError(
            f"{quoted(unknown[0])} is none of the sweep's own flags ({', '.join(parser.flags)}); "
            "those of main.py follow after `--`."
        )
    if (args.out is None) == (args.best is None):
        raise UsageError("pass --out FOLDER to run a sweep, or --best FOLDER to ask one.")
    if not args.grid and args.list is None:
        raise UsageError("there is nothing to try: pass --grid FLAG=V1,V2 or --list FILE.")
    if args.best is None and not words:
        raise UsageError(
            "main.py's flags are missing: they follow the sweep's own after `--`, as in "
            "--out FOLDER --grid lr=1e-4,1e-3 -- --modelwrapper map ..."
        )
    twice = {value for value in args.seeds if args.seeds.count(value) > 1}
    if twice:
        raise UsageError(f"--seeds names {min(twice)} twice; once is enough.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a sweep starts its runs itself, and WORLD_SIZE says that it is one of several "
            "processes; start it with python instead of accelerate or torchrun."
        )
    return args.freeze(), words


# --- the runs -------------------------------------------------------------------------------------


def plan(args: Args, words: list[str], candidates: list[Candidate]) -> list[Run]:
    """Every run, its flags checked, candidates in the order of the call.

    Raises:
        UsageError: a flag that is unknown, breaks a rule, is not for a sweep, or lets candidates
            be compared on different rows.
    """
    shared = build_parser(lambda parser: None)
    check_words(shared, words)
    runs = []
    for candidate in candidates:
        check_words(shared, candidate.words)
        both = set(flags_of(words)) & set(flags_of(candidate.words))
        if both:
            raise UsageError(f"{min(both)} is tried, and given after the `--` as well: drop it.")
        for number in args.seeds:
            runs.append(run_of(args.out, words, candidate, number))
    check_comparable(runs)
    return runs


def check_words(shared: Parser, words: list[str]) -> None:
    """Refuse what the sweep decides itself."""
    for name in shared.said(words)[0]:
        if name in NOT_TAKEN:
            raise UsageError(f"{spelling(name)} is not for a sweep's runs: {NOT_TAKEN[name]}.")


def run_of(out: str, words: list[str], candidate: Candidate, number: int) -> Run:
    """A run, under main.py's own rules.

    Raises:
        UsageError: main.py would refuse it.
    """
    told = [
        *with_seed(words, number),
        *candidate.words,
        *("--seed", str(number), "--testing-set", "train_val", "--output-dir", f"{out}/runs"),
        *("--log-path", f"{candidate.name}-seed{number}", "--resume"),
    ]
    try:
        args = program.parse_args(told, check_early=program.check_names)
        program.check_names(args)
        program.check_purpose(args)
    except UsageError as error:
        raise UsageError(f"{quoted(' '.join(candidate.words))}: {error}") from None
    if modelwrappers.get_wrapper(args.modelwrapper).tunes_on_held_out(args):
        raise UsageError(
            f"{quoted(' '.join(candidate.words))}: --modelwrapper {args.modelwrapper} would choose "
            "by the rows that candidates are compared on (a prior precision from validation): give "
            "it a number, and try several with --grid."
        )
    return Run(candidate, number, told, args, run_folder_path(args))


def with_seed(words: list[str], number: int) -> list[str]:
    """The words with {seed} in the value of --load-lora-path replaced."""
    flag, changed, is_value = "--load-lora-path", [], False
    for word in words:
        own = folded(word.partition("=")[0]) == flag
        changed.append(word.replace("{seed}", str(number)) if is_value or own else word)
        is_value = own and "=" not in word
    return changed


def check_comparable(runs: list[Run]) -> None:
    """All are scored on the same rows, no two of them are the same, and what is there is theirs.

    Raises:
        UsageError: one of these does not hold.
    """
    first, told = runs[0], {}
    for run in runs:
        for name in SAME_ROWS:
            if getattr(run.args, name) != getattr(first.args, name):
                raise UsageError(
                    f"{spelling(name)} cannot be tried: candidates would be compared on different "
                    "rows. Make a sweep for each value."
                )
        settings = {k: v for k, v in stored_flags(run.args).items() if k != "log_path"}
        key = repr(sorted(settings.items()))
        other = told.setdefault(key, run)
        if other is not run:
            raise UsageError(
                f"{quoted(' '.join(run.candidate.words))} is the same run as "
                f"{quoted(' '.join(other.candidate.words))}; drop one of them."
            )
        if run.state != "to do":
            record = read_run_record(run.folder / ARGS_FILE, "--out")
            if changed := differences(run.args, record):
                raise UsageError(
                    f"--out: {quoted(str(run.folder))} was made with other flags: "
                    f"{'; '.join(changed)}. Repeat those, or choose another folder."
                )


def launch(words: list[str]) -> Ended:
    """main.py in a process of its own, told of SIGINT and SIGTERM once, so that it keeps its state.

    Raises:
        KeyboardInterrupt: a signal came; the run has ended.
    """
    # a session of its own: else a terminal's Ctrl-C would reach it beside what is sent here, and a
    # second signal ends a run without its state
    command = [sys.executable, str(MAIN), *words]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        finally:
            if process.poll() is None:  # a second signal
                process.kill()
                process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - 20_000))
        return Ended(code, output.read().decode(errors="replace"))


def reason_of(ended: Ended) -> str:
    """Why a run has failed, on one line."""
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        hint = ", as it is when the memory is full" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    lines = [line.strip() for line in ended.told.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"\b(UsageError|RunError): ", line)]
    return printable((told or lines or ["nothing was said"])[-1])[:500]


def run_all(runs: list[Run]) -> dict[str, str]:
    """Make the runs that are not finished.

    Returns:
        candidate -> why it has failed, of the first seed in which it did.
    Raises:
        RunError: a run ended by a signal, for want of disk space or because another run writes to
            its folder, so that the candidates left would be compared without it.
    """
    failed: dict[str, str] = {}
    for place, run in enumerate(runs, start=1):
        about = f"{place} of {len(runs)}: {' '.join(run.candidate.words)}, seed {run.seed}"
        if run.state == "finished":
            logger.info("%s: is finished.", about)
            continue
        logger.info("%s ...", about)
        ended = launch(run.words)
        if ended.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):  # sent to the run alone
            raise KeyboardInterrupt
        if ended.code != 0 or run.state != "finished":
            reason = reason_of(ended)
            if ended.code < 0 or NOT_ITS_OWN.search(reason):
                raise RunError(
                    f"{about}: {reason}. The sweep has stopped, and nothing is ranked: this says "
                    "nothing about the candidate. Remove the cause and run the same command with "
                    "--resume; drop the candidate if it needs more memory than there is."
                )
            logger.error("%s: failed (exit code %d): %s", about, ended.code, reason)
            failed.setdefault(run.candidate.name, f"seed {run.seed}: {reason}")
    return failed


# --- from flags to files --------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """Check, run, rank, tell.

    Raises:
        UsageError: a wrong call; nothing was run.
        RunError: no candidate has come to its end, one was ended from outside, or the disk is full.
    """
    args, words = parse_args(argv)
    candidates = candidates_of(args)
    if args.best is not None:
        print("\n".join(best_words(Path(args.best), candidates)))
        return
    runs = plan(args, words, candidates)
    if args.dry_run:
        for run in runs:
            print(f"{run.state}: {shlex.join(['python', 'main.py', *run.words])}")
        return
    out = Path(args.out)
    open_folder(out, args)
    command = shlex.join(["python", "scripts/sweep.py", *argv])
    write_json(out / SETTINGS_FILE, {"command": command, "run": program.provenance(argv)})
    if any(run.state != "finished" for run in runs):
        for name in MADE:  # of fewer runs
            (out / name).unlink(missing_ok=True)
    failed = run_all(runs)
    scored = {
        candidate.name: {
            run.seed: score_run(run.folder, args.rank_by, run.args.num_bins)
            for run in runs
            if run.candidate is candidate
        }
        for candidate in candidates
        if candidate.name not in failed
    }
    if not scored:
        reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise RunError(f"every candidate has failed. {reasons}")
    ranked = rank(scored, args.rank_by)
    num_rows = next(iter(scored[ranked[0].name].values())).num_rows
    tables = {
        MADE[0]: markdown(ranked, args.rank_by, num_rows, failed, command),
        MADE[1]: comma_separated(ranked, args.rank_by, failed),
    }
    for name, text in tables.items():
        write_atomically(out / name, lambda path, text=text: path.write_text(text, "utf-8"))
    write_best(out, ranked, candidates, args)
    tell(ranked, args, num_rows, out)


def open_folder(out: Path, args: Args) -> None:
    """See that results may be written there.

    Raises:
        UsageError: they would replace those of another sweep, or of another program.
    """
    check_place(out / MADE[0])
    if (out / SETTINGS_FILE).exists():
        if not args.resume:
            raise UsageError(
                f"--out {quoted(args.out)} has a sweep: pass --resume to go on with it, or choose "
                "another folder."
            )
        sweep_temporaries(out, (SETTINGS_FILE, *MADE))
        return
    for name in MADE:
        if os.path.lexists(out / name):
            raise UsageError(
                f"--out: {quoted(str(out / name))} is there, but no {SETTINGS_FILE} of a sweep "
                "that would have made it; move it away, or choose another folder."
            )


def write_best(out: Path, ranked: list[Ranked], candidates: list[Candidate], args: Args) -> None:
    """best.json."""
    words = next(c.words for c in candidates if c.name == ranked[0].name)
    write_json(
        out / BEST_FILE,
        {"words": words, "ranked_by": args.rank_by, "seeds": ranked[0].seeds}
        | {"values": ranked[0].values},
    )


def best_words(out: Path, candidates: list[Candidate]) -> list[str]:
    """The call's own candidate that the sweep in `out` has chosen.

    Raises:
        UsageError: there is none, or it is none of the call's candidates.
    """
    best = read_record(out / BEST_FILE, Best, "--best", "Finish the sweep with --resume.")
    for candidate in candidates:
        if candidate.words == best.words:
            return candidate.words
    raise UsageError(
        f"--best: {out / BEST_FILE} has {quoted(' '.join(best.words))}, which is no candidate of "
        "this call's --grid and --list; repeat those of the sweep."
    )


def tell(ranked: list[Ranked], args: Args, num_rows: int, out: Path) -> None:
    """The ranking, on the terminal."""
    print(f"\n{num_rows} rows held out of training:")
    print(writable(terminal(ranked, args.rank_by), sys.stdout), flush=True)
    logger.info("Sweep: %s; best: %s", quoted(str(out / MADE[0])), ranked[0].name)


def run(argv: list[str] | None = None) -> int:
    """`main` for the command line: messages without a traceback, and an exit code."""
    told = "Interrupted; run the same command with --resume to go on."
    return run_script(main, argv, told)


if __name__ == "__main__":
    sys.exit(run())
