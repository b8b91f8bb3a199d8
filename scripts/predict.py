"""Answer rows with a trained posterior: python scripts/predict.py POSTERIOR --rows FILE --out FILE

POSTERIOR is a run's folder or a hub repo. The rows need the columns of its task, no labels: JSONL,
JSON, CSV, parquet, or plain lines of text where the task reads one column; "-" is standard input or
output. Every row gets its answer, the probabilities of all answers, and how the posterior's draws
differ. With labels the accuracy and the calibration are told at the end. All rows are read once
before anything is computed. Messages go to standard error.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from decisions.acquisition import (
    CRITERIA,
    OF_INFORMATION,
    acquire,
    check_request,
    row_scores,
    warn_near_cap,
)
from decisions.calibration import Wanted
from decisions.conformal import SCORES
from decisions.selective import SCORES as CONFIDENCES
from utils.args import Args, Parser, add_switch, count, positive_int, seed, share
from utils.errors import UsageError, described, quoted
from utils.logging import logger, quiet_libraries
from utils.processes import on_main_process
from utils.program import run_script

if TYPE_CHECKING:
    from modelwrappers.engine.prediction import Predictions
    from modelwrappers.wrapperbase import WrapperBase
    from utils.row_output import RowOutput

ROWS = ("jsonl", "json", "csv", "parquet", "txt")
OUT = ("jsonl", "csv", "parquet")
MOST_TOLD = 3  # bad rows


def parse_args(argv: list[str]) -> Args:
    """The flags."""
    parser = Parser(
        prog="predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("posterior", metavar="POSTERIOR", help="a run's folder, or a hub repo")
    parser.add_argument("--rows", required=True, metavar="FILE", help="- is standard input")
    parser.add_argument("--out", required=True, metavar="FILE", help="- is standard output")
    parser.add_argument("--rows-format", choices=ROWS, help="default: by the name; of - jsonl")
    parser.add_argument("--out-format", choices=OUT, help="default: by the name; of - jsonl")
    parser.add_argument("--model", metavar="NAME", help="the base model, if it has moved")
    parser.add_argument("--modelwrapper", metavar="FILE.py:CLASS", help="a method of your own")
    parser.add_argument(
        "--dataset", metavar="NAME", help="whose rows these are, or FILE.py:NAME (default: as told)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--n-draws", type=count, help="default: the run's; 0: posterior mean")
    parser.add_argument("--seed-sampling", type=seed, help="of the draws (default: the run's)")
    parser.add_argument("--eval-batch-size", type=positive_int, help="default: the run's")
    parser.add_argument(
        "--window", type=positive_int, default=8192, help="rows that are sorted by length together"
    )
    sets = parser.add_argument_group("sets and answers with a guarantee (a run with --calibrate)")
    sets.add_argument("--coverage", type=share, help="of sets, such as 0.9")
    sets.add_argument("--set-score", choices=SCORES, default="lac", help="how sets are made")
    add_switch(sets, "--per-class", help="the coverage holds for the rows of every class")
    sets.add_argument(
        "--max-risk",
        type=share,
        help="answer only where at most this share is wrong",
    )
    sets.add_argument("--confidence", type=share, default=0.9, help="with which --max-risk holds")
    sets.add_argument(
        "--confidence-by",
        choices=CONFIDENCES,
        default=CONFIDENCES[0],
        help="what is answered first",
    )
    label = parser.add_argument_group("what to label next")
    label.add_argument("--acquire", type=positive_int, metavar="K", help="write K rows to label")
    label.add_argument("--by", choices=CRITERIA, help="what makes a row worth it (default: bald)")
    label.add_argument("--seed", type=seed, default=0, help="of what is random in it")
    add_switch(parser, "--skip-bad-rows", help="write the reason in the place of the answer")
    add_switch(parser, "--resume", help="go on from an interrupted run")
    add_switch(parser, "--overwrite", help="start over where one was interrupted")
    args = parser.parse_args(argv, Args())
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: pass one of them.")
    for flag, name, owner in (
        ("--per-class", args.per_class, args.coverage),
        ("--set-score", args.set_score != "lac", args.coverage),
        ("--confidence-by", args.confidence_by != CONFIDENCES[0], args.max_risk),
    ):
        if name and owner is None:
            of = "--max-risk" if flag == "--confidence-by" else "--coverage"
            raise UsageError(f"{flag} is part of {of}, which is not given.")
    if args.by is not None and args.acquire is None:
        raise UsageError("--by says how rows are chosen, but --acquire K is not given.")
    if args.acquire is not None and args.resume and args.by == "batchbald":
        raise UsageError("--by batchbald holds the draws of all rows, which --resume has not kept.")
    args.by = args.by or "bald"
    if args.out == "-" and args.resume:
        raise UsageError("--resume goes on with a file, but --out - is standard output.")
    if "-" in (args.rows, args.out) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes share files, not - : give --rows and --out as files.")
    args.rows_format = _format(args.rows, args.rows_format, ROWS, "--rows")
    args.out_format = _format(args.out, args.out_format, OUT, "--out")
    if args.out == "-" and args.out_format != "jsonl":
        raise UsageError(f"--out - is written as jsonl; --out-format is {args.out_format}.")
    return args.freeze()


def _format(name: str, given: str | None, known: tuple[str, ...], flag: str) -> str:
    suffix = "jsonl" if name == "-" else Path(name).suffix.lower().removeprefix(".")
    if given is None and suffix not in known:
        raise UsageError(
            f"{flag} {quoted(name)}: its name does not say what it holds; let it end in "
            f"{', '.join('.' + form for form in known)}, or pass {flag}-format."
        )
    return given or suffix


# --- the rows -------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The input, which was read once from beginning to end.

    Attributes:
        path: of the file.
        number: how many rows it has, bad ones included.
        usable: how many can be answered.
        digest: of its bytes.
    """

    path: Path
    number: int
    usable: int
    digest: str


def read_through(posterior: WrapperBase, path: Path, args: Args) -> Rows:
    """Look at every row before anything is computed.

    Raises:
        UsageError: a row cannot be used, unless --skip-bad-rows; or there is none that can.
    """
    number, bad, first = 0, 0, []
    for _, _, problem in examples_of(posterior, path, args):
        number += 1
        if problem is not None:
            bad += 1
            first += [problem] if len(first) < MOST_TOLD else []
            if not args.skip_bad_rows:
                raise UsageError(f"{problem} (--skip-bad-rows goes on without such rows)")
    if number == bad:
        raise UsageError(
            f"--rows {quoted(args.rows)}: there is no row that can be used"
            f"{f'; the first one: {first[0]}' if first else '.'}"
        )
    for problem in first:
        logger.warning("Left out: %s", problem)
    if bad:
        logger.warning("%d of %d rows cannot be used; their places say why.", bad, number)
    return Rows(path, number, number - bad, digest_of(path))


def examples_of(
    posterior: WrapperBase, path: Path, args: Args, start: int = 0
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, str | None]]:
    """(row, example, problem) of the rows from `start` on; one of the last two is None."""
    from dataset.files import stream_rows

    reader = posterior.reader
    shown = "standard input" if args.rows == "-" else args.rows
    reads = stream_rows(path, args.rows_format, shown, "--rows", reader.texts)
    for index, (where, row, problem) in enumerate(reads):
        if index < start:
            continue
        as_dict = {reader.text_column or "text": row} if isinstance(row, str) else row
        if problem is None:
            problem = unwritable(as_dict, where, args.out_format)
        if problem is not None:
            as_dict = {}
        else:
            try:
                yield as_dict, reader.example(row, where) | {"index": index}, None
                continue
            except UsageError as error:
                problem = str(error)
        yield as_dict, None, problem


# --- the answers ----------------------------------------------------------------------------------


class Job:
    """What is made of the rows' predictions, one window after the other.

    Args:
        posterior: predicts.
        args: flags of this call.
    """

    def __init__(self, posterior: WrapperBase, args: Args) -> None:
        from modelwrappers.engine.answers import rules_of

        self.posterior, self.args = posterior, args
        wanted = Wanted(**{name: getattr(args, name) for name in Wanted._fields})
        self.rules = rules_of(posterior, wanted)
        for rule in filter(None, self.rules):
            logger.info(rule.promise())
        self._draws: list[np.ndarray] = []  # of batchbald, which looks at all rows together
        self._rows: list[int] = []

    def records_of(
        self, window: list[tuple[dict, dict | None, str | None]], start: int
    ) -> list[dict[str, Any]]:
        """One record per row of a window; bad rows have their reason."""
        from modelwrappers.engine.answers import Answers, keys_of, predict_window

        examples = [example for _, example, _ in window if example is not None]
        answers: Iterator[dict[str, Any]] = iter(())
        if examples:
            predictions = predict_window(self.posterior, examples)
            found = Answers.of(predictions).records(
                self.posterior.answers, *self.rules, keys_of(examples)
            )
            answers = iter(self._scored(found, predictions))
        return [
            {"row": start + i, "input": _jsonable(row)}
            | (next(answers) if example is not None else {"error": problem})
            for i, (row, example, problem) in enumerate(window)
        ]

    def _scored(
        self, records: list[dict[str, Any]], predictions: Predictions
    ) -> list[dict[str, Any]]:
        """With what makes each row worth its label, if that is asked for."""
        args = self.args
        if args.acquire is None:
            return records
        draws = predictions.log_probs.numpy()
        if args.by == "batchbald":
            self._draws.append(draws)
            self._rows += predictions.index.tolist()
            return records
        own = None if predictions.num_draws is None else predictions.num_draws.numpy()
        scores = row_scores(draws, args.by, args.seed, own, predictions.index.tolist())
        return [
            record | {"score": float(score)} for record, score in zip(records, scores, strict=True)
        ]

    def check_rows(self, number: int) -> None:
        """There are rows and draws enough for what is asked for.

        Raises:
            UsageError: there are not.
        """
        if self.args.acquire is not None:
            draws = max(1, self.posterior.final_draws())
            if getattr(self.posterior, "has_members", False):
                draws = max(draws, len(self.posterior.peft_config))
            check_request(number, draws, self.args.acquire, self.args.by)

    def chosen(self, output: RowOutput) -> list[dict[str, Any]]:
        """The records of the rows to label, the first one first."""
        if self.args.by == "batchbald":
            found = acquire(
                np.concatenate(self._draws), self.args.acquire, self.args.by, self.args.seed
            )
            scores = {self._rows[i]: s for i, s in zip(found.indices, found.scores, strict=True)}
            records = [
                r | {"score": float(scores[r["row"]])}
                for r in output.records()
                if r["row"] in scores
            ]
            order = {row: place for place, row in enumerate(scores)}
            return sorted(records, key=lambda record: order[record["row"]])
        usable = (record for record in output.records() if "score" in record)
        best = heapq.nsmallest(
            self.args.acquire, usable, key=lambda record: (-record["score"], record["row"])
        )
        if self.args.by in OF_INFORMATION:
            fullest = max(best, key=lambda record: record["mutual_information"])
            what = f"The mutual information of row {fullest['row']}"
            warn_near_cap(fullest["mutual_information"], fullest["num_draws"], what)
        return best

    def tell(self, records: Iterator[dict[str, Any]]) -> None:
        """How many were answered, and what is known of the labelled rows."""
        from modelwrappers.engine.answer_summary import AnswerSummary

        summary = AnswerSummary(self.posterior.answers)
        for record in records:
            summary.add(record)
        for line in summary.lines(self.posterior.args.num_bins):
            logger.info(line)


def unwritable(row: dict[str, Any], where: str, form: str) -> str | None:
    """Why a row cannot be part of the output, in one of the formats `OUT`, if so."""
    from utils.row_output import flat

    try:
        row = _jsonable(row)
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return f"{where}: the row cannot be written out again ({described(error)})."
    if form == "csv" and any("\0" in str(cell) for pair in flat(row).items() for cell in pair):
        return (
            f"{where}: the row holds a NUL character, which no CSV can hold; remove it, or write "
            "another --out-format, such as jsonl."
        )
    return None


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a parquet file may hold dates and bytes."""
    return json.loads(json.dumps(row, default=str))


def main(argv: list[str]) -> None:
    """Load, read, answer, write.

    Raises:
        UsageError: a wrong call or a bad row; nothing is written.
        RunError: the disk is full.
    """
    args = parse_args(argv)
    from dataset.files import check_file, kept_input
    from utils.row_output import check_place

    with ExitStack() as stack:
        if args.rows == "-":
            rows = stack.enter_context(kept_input())
        else:
            rows = Path(args.rows)
            check_file(rows, "--rows")
            if args.out != "-" and Path(args.out).exists() and rows.samefile(args.out):
                raise UsageError(
                    f"--out {quoted(args.out)} is --rows itself, which it would replace; choose "
                    "another name."
                )
        if args.out == "-":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="answers-"))
            out = Path(folder) / "rows.jsonl"
        else:
            out = Path(args.out)
            check_place(out)
        answer_file(rows, out, args)
        if args.out == "-":
            with open(out, encoding="utf-8") as file:
                shutil.copyfileobj(file, sys.stdout)
            sys.stdout.flush()


def answer_file(path: Path, out: Path, args: Args) -> None:
    """Answer the rows of a file."""
    from utils.row_output import RowOutput

    posterior = load(args)
    job = Job(posterior, args)
    rows = read_through(posterior, path, args)
    job.check_rows(rows.usable)
    output = RowOutput(out, args.out_format, job_name(posterior, rows, args))

    def begin() -> int:
        output.open(args.resume, args.overwrite)
        return output.done

    def finish() -> None:
        job.tell(output.records())
        chosen = job.chosen(output) if args.acquire is not None else None
        output.finish(None if chosen is None else lambda: chosen)
        logger.info("%d rows: %s", args.acquire or rows.number, quoted(args.out))

    try:
        start = on_main_process(posterior.accelerator, begin)
        fill(output, job, rows, args, start)
        on_main_process(posterior.accelerator, finish)
    finally:
        output.close()


def fill(output: RowOutput, job: Job, rows: Rows, args: Args, start: int) -> None:
    """Answer the rows from `start` on, which are not in the output yet, window by window."""
    from tqdm import tqdm

    posterior = job.posterior
    accelerator = posterior.accelerator
    window: list[tuple[dict, dict | None, str | None]] = []
    hidden = not accelerator.is_main_process
    with tqdm(total=rows.number, initial=start, unit="row", disable=hidden) as bar:

        def answer_window() -> None:
            nonlocal start
            records = job.records_of(window, start)
            start += len(window)
            on_main_process(accelerator, lambda: output.append(records, len(window)))
            bar.update(len(window))
            window.clear()

        for item in examples_of(posterior, rows.path, args, start):
            window.append(item)
            if len(window) == args.window:
                answer_window()
        if window:
            answer_window()


def load(args: Args) -> WrapperBase:
    """The posterior, with the settings of this call."""
    from modelwrappers import load_posterior

    quiet_libraries()
    settings: dict[str, Any] = {}
    if args.n_draws is not None:
        settings["bayes_inference_notsample"] = args.n_draws == 0
        settings["bayes_eval_n_samples_final"] = max(1, args.n_draws)
    for name in ("seed_sampling", "eval_batch_size"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    posterior = load_posterior(
        args.posterior,
        model=args.model,
        device=args.device,
        modelwrapper=args.modelwrapper,
        dataset=args.dataset,
        shared_draws=args.acquire is not None and args.by == "batchbald",
        **settings,
    )
    if args.n_draws is not None and (posterior.has_members or not posterior.is_stochastic):
        raise UsageError(
            f"--n-draws {args.n_draws}: {posterior.args.modelwrapper} has no draws to choose the "
            "number of; drop it."
        )
    return posterior


def job_name(posterior: WrapperBase, rows: Rows, args: Args) -> str:
    """What an interrupted job must have in common with this one to be gone on with."""
    flags = posterior.args.as_dict()
    folder = Path(flags["load_lora_path"])
    patterns = [name.replace("{n}", "*") for name in posterior.adapter_files]
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    own = {
        "rows": rows.digest,
        "flags": {key: value for key, value in flags.items() if key not in NOT_OF_THE_JOB},
        "call": {name: getattr(args, name) for name in OF_THE_JOB},
        "posterior": [(str(f.relative_to(folder)), digest_of(f)) for f in files],
    }
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()


OF_THE_JOB = (
    *("window", "rows_format", "dataset", "skip_bad_rows", "acquire", "by", "seed"),
    *Wanted._fields,
)
# where the adapter lies and what computes may change between two calls of one job
NOT_OF_THE_JOB = ("load_lora_path", "device", "resume", "overwrite")


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(argv: list[str] | None = None) -> int:
    """`main` for the command line: messages without a traceback, and an exit code."""
    told = "Interrupted; with --out FILE, --resume goes on (not with batchbald)."
    return run_script(main, argv, told, sys.stderr)


if __name__ == "__main__":
    sys.exit(run())
