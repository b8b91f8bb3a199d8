"""Simulate active learning on a labelled task: what are labels worth, chosen by which criterion?

    python scripts/active_learning.py --out FOLDER --by bald random --initial 20 --acquire 20 \\
        --rounds 5 --seeds 1 2 3 4 5 [flags of main.py: method, model, data set, length, ...]

For each seed some training rows are labelled at random, the same ones for all criteria. Each round
trains a new adapter on the labelled rows, evaluates it, predicts the pool (the other training rows)
and has the K rows labelled that the criterion chooses. Learning curves, their areas and what they
are more than random's stand in FOLDER/curves.md at the end. The length is that of every round.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as program
import modelwrappers
from decisions.acquisition import CRITERIA, acquire, check_request
from report.learning_curves import (
    BASELINE,
    comma_separated,
    curves_of,
    draw,
    markdown,
    terminal,
)
from report.plots import save_figure
from utils.args import Args, Parser, add_switch, build_parser, positive_int, seed
from utils.data_set_names import data_set_name
from utils.errors import UsageError, quoted
from utils.files import write_atomically
from utils.flags import spelling
from utils.logging import (
    logger,
    name_process,
    notice_once,
    quiet_libraries,
    writable,
)
from utils.parser import folded, meant_flag
from utils.program import run_script
from utils.round_log import Plan, Round, RoundLog, Split
from utils.row_output import check_place
from utils.run_records import stored_flags
from utils.seeding import mix_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from modelwrappers.wrapperbase import WrapperBase

# Enough that a row's mutual information is far from log N = 3.9 nats, and a batch's not too near.
DRAWS = 50
MADE = ("curves.md", "curves.csv", "curves.png", "curves.pdf")

# Flags of main.py that the simulation decides itself.
NOT_TAKEN = {
    **dict.fromkeys(("seed", "seed_data", "seed_sampling"), "each of --seeds has its own"),
    "limit_train": "the simulation says which rows are trained on; --pool N takes fewer",
    **dict.fromkeys(
        ("load_lora_path", "load_lora_huggingface_repo"),
        "every round trains a new adapter, on labelled rows alone",
    ),
    "config": "a stored run has rows and seeds of its own; pass the flags themselves",
    **dict.fromkeys(("output_dir", "log_path", "checkpoint_name"), "results lie in --out"),
    **dict.fromkeys(("checkpoint", "save_per_steps"), "no adapter of the rounds is kept"),
    **dict.fromkeys(
        ("ood_datasets", "ood_ori_dataset"), "the task's own evaluation split is what is measured"
    ),
    **dict.fromkeys(("eval_per_steps", "eval_steps"), "a round is evaluated at its end"),
    **dict.fromkeys(("wandb_entity", "wandb_project", "wandb_name"), "rounds are not tracked"),
}
OF_THE_PLAN = ("by", "initial", "acquire", "rounds", "seeds", "pool", "n_draws")
DECIDED = ("--tracker", "none", "--eval-per-steps", "0")


# --- flags ----------------------------------------------------------------------------------------


def build_own_parser() -> Parser:
    """The simulation's own flags."""
    parser = Parser(
        prog="active_learning.py",
        description=__doc__,
        epilog="All other flags are those of main.py: `python main.py --help` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where results lie")
    parser.add_argument(
        "--by", nargs="+", choices=CRITERIA, required=True, help="criteria; random is the baseline"
    )
    parser.add_argument(
        "--initial",
        type=positive_int,
        required=True,
        metavar="N",
        help="rows that are labelled at the beginning, whatever their classes",
    )
    parser.add_argument(
        "--acquire", type=positive_int, required=True, metavar="K", help="rows labelled per round"
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        required=True,
        metavar="R",
        help="how often rows are labelled; R + 1 trainings",
    )
    parser.add_argument("--seeds", nargs="+", type=seed, required=True, help="one loop for each")
    parser.add_argument(
        "--pool", type=positive_int, metavar="N", help="rows that can be chosen (default: all)"
    )
    parser.add_argument(
        "--n-draws",
        type=positive_int,
        metavar="N",
        help=f"of the pool's predictions (default: {DRAWS}; an ensemble has its members)",
    )
    add_switch(parser, "--resume", help="go on after the last round that is there")
    add_switch(parser, "--overwrite", help="replace an earlier simulation in the same folder")
    return parser


def parse_args(argv: list[str]) -> tuple[Args, list[str]]:
    """The simulation's own flags, and the words that are for main.py.

    Raises:
        UsageError: a broken rule, or a flag that the simulation decides itself.
    """
    parser = build_own_parser()
    args, words = parser.parse_known_args(argv, Args())
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: pass one of them.")
    for flag, values in (("--by", args.by), ("--seeds", args.seeds)):
        twice = {value for value in values if values.count(value) > 1}
        if twice:
            raise UsageError(f"{flag} names {min(twice)} twice; once is enough.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a simulation runs in one process, and WORLD_SIZE says that there are several; start "
            "it with python instead of accelerate or torchrun."
        )
    check_words(words, parser)
    return args.freeze(), words


def check_words(words: list[str], own: Parser) -> None:
    """Refuse what the simulation decides itself, and misspelled flags of its own."""
    shared = build_parser(lambda parser: None)
    said, unknown = shared.said(words)
    for name, value in said.items():
        if name in NOT_TAKEN:
            raise UsageError(f"{spelling(name)} is not for a simulation: {NOT_TAKEN[name]}.")
        if name == "tracker" and value != "none":
            raise UsageError(f"--tracker {value} is not for a simulation: rounds are not tracked.")
    known = {folded(flag) for flag in modelwrappers.catalogue().flags}
    for word in unknown:
        flag = word.partition("=")[0]
        if not flag.startswith("--") or folded(flag) in known:
            continue
        meant = meant_flag(flag, [*shared.flags, *known, *own.flags])
        if meant in own.flags:
            raise UsageError(f"unknown flag {quoted(flag)}; did you mean '{meant}'?")


def check_base(args: Args) -> None:
    """Every round trains, on the labelled rows and no others.

    Raises:
        UsageError: there is no length, or a flag uses other labels or leaves labelled rows out.
    """
    if not (args.max_train_steps or args.n_epochs):
        raise UsageError(
            "--max-train-steps and --n-epochs are 0, but every round trains; pass one of them."
        )
    if args.hold_out:
        raise UsageError(
            "rows are held out (--hold-out, --temperature-scaling, --calibrate, --testing-set "
            "train_val, or a prior precision from validation): their labels would be used without "
            "being counted; drop that flag."
        )
    if args.num_shots:
        raise UsageError(
            f"--num-shots {args.num_shots}: the labels of solved examples would be used without "
            "being counted; drop it."
        )
    if args.drop_last:
        raise UsageError(
            "--drop-last leaves labelled rows out of training (--protocol original sets it); pass "
            "--drop-last false."
        )


# --- the loop -------------------------------------------------------------------------------------


class Simulation:
    """Every round of every criterion and seed, by the way that runs go.

    Args:
        args: the simulation's own flags.
        words: flags for main.py.
    Attributes:
        base: what main.py makes of the words.
        all_args: that with the simulation's own flags, as they are kept.
        plan: which rounds there are; known once the rows are.
        rows: a digest of the training rows, known with the plan.
        num_draws: of the pool's predictions.
    """

    plan: Plan
    rows: str
    num_draws: int

    def __init__(self, args: Args, words: list[str]) -> None:
        self.args, self._words = args, words
        self.base = program.parse_args([*words, *DECIDED], check_early=program.check_names)
        program.check_names(self.base)
        check_base(self.base)
        own = {name: getattr(args, name) for name in OF_THE_PLAN}
        given = self.base.given | {key: value for key, value in own.items() if value is not None}
        told = {"resume": args.resume, "overwrite": args.overwrite}
        self.all_args = self.base.replaced(given=given, **own, **told)

    def look(self, accelerator: Accelerator) -> None:
        """Load everything once and see that all rounds are possible, before the first of them.

        Raises:
            UsageError: they are not.
        """
        from modelwrappers.loading import check_shared_draws

        args = self.args
        asked = args.n_draws or DRAWS
        # as many draws at the end as of the pool: the wrapper says what the method makes of them
        first = self._args_of(args.seeds[0]).replaced(bayes_eval_n_samples_final=asked)
        wrapper = program.assemble(first, accelerator)
        rows = wrapper.dataset.train_rows
        self.plan, self.rows = self.planned([row["index"] for row in rows]), digest_of(rows)
        self.num_draws = max(1, wrapper.final_draws())
        if wrapper.has_members and self.base.ensemble_average == "logits":
            self.num_draws = 1
        if args.n_draws not in (None, self.num_draws):
            notice_once(
                f"--n-draws {asked} has no effect: {self.base.modelwrapper} predicts with "
                f"{self.num_draws} here."
            )
        for by in args.by:
            check_request(len(self.plan.splits[first.seed].pool), self.num_draws, args.acquire, by)
            if by == "batchbald":
                check_shared_draws(wrapper)

    def planned(self, indices: list[int]) -> Plan:
        """The rows of each seed."""
        from dataset.batches import seeded_order

        args = self.args
        wanted, rest = args.rounds * args.acquire, max(0, len(indices) - args.initial)
        there = rest if args.pool is None else min(rest, args.pool)
        if wanted > there:
            raise UsageError(
                f"{args.rounds} rounds of {args.acquire} rows take {wanted} rows from the pool, "
                f"which has {there}: of the {len(indices)} training rows {args.initial} are "
                f"initial ones{'' if args.pool is None else f', and --pool is {args.pool}'}. Lower "
                "--rounds, --acquire or --initial, or raise --pool."
            )
        splits = {}
        for number in args.seeds:
            order = [indices[i] for i in seeded_order(len(indices), "active learning", number)]
            pool = order[args.initial : args.initial + there]
            splits[number] = Split(order[: args.initial], pool)
        return Plan(splits, args.by, args.rounds, args.acquire)

    def _args_of(self, number: int) -> Args:
        """A seed's flags; no run's folder is written."""
        args = program.parse_args([*self._words, *DECIDED, "--seed", str(number)])
        return args.replaced(output_dir=None)

    def run(self, log: RoundLog, accelerator: Accelerator) -> None:
        """Make the rounds that are not there yet, each kept when it is done."""
        gc.collect()
        gc.freeze()  # the libraries: to look through them each time took half of a short round
        try:
            for key in list(self.plan.keys())[len(log.done) :]:
                found = self._round(key, self.plan.rows_of(key, log.done), accelerator)
                log.append(found)
                logger.info(
                    "%d of %d: seed %d, %s, round %d, %d labels: ACC %.4f  ECE %.4f  NLL %.4f  "
                    "Brier %.4f  (%.1f s)",
                    *(len(log.done), self.plan.size, *key, found.labelled),
                    *(found.acc, found.ece, found.nll, found.brier, found.seconds),
                )
                gc.collect()  # a wrapper is a ring of objects, and the next one needs its memory
        finally:
            gc.unfreeze()

    def _round(self, key: tuple[int, str, int], rows: list[int], accelerator: Accelerator) -> Round:
        """Train on the rows from scratch, evaluate, choose."""
        number, by, place = key
        started = time.perf_counter()
        wrapper = program.assemble(
            self._args_of(number), accelerator, lambda dataset: dataset.train_on(rows)
        )
        metrics = wrapper.fit_evaluate()
        acquired, num_draws = [], None
        if place < self.plan.rounds:
            acquired, num_draws = self._chosen(wrapper, key)
        return Round(
            seed=number,
            by=by,
            round=place,
            labelled=len(rows),
            initial=rows if place == 0 else [],
            acquired=acquired,
            **metrics._asdict(),
            num_draws=num_draws,
            seconds=round(time.perf_counter() - started, 3),
        )

    def _chosen(self, wrapper: WrapperBase, key: tuple[int, str, int]) -> tuple[list[int], int]:
        """Rows of the pool, as the criterion chooses them, and how many draws it has seen."""
        from modelwrappers.engine.prediction import draws_for

        number, by, place = key
        # a choice at random looks at nothing: the cheapest prediction will do
        wanted = 0 if by == BASELINE else self.num_draws
        pool = set(self.plan.splits[number].pool)
        dataset = wrapper.dataset
        loader = dataset.eval_loader([row for row in dataset.pool_rows if row["index"] in pool])
        predictions = wrapper.predict(loader, **draws_for(wrapper.predict, wanted))
        draws, index = predictions.log_probs.numpy(), predictions.index.numpy()
        own = predictions.num_draws.numpy() if predictions.num_draws is not None else None
        chance = mix_seed("active learning round", number, place)
        found = acquire(draws, self.args.acquire, by, chance, own, keys=index.tolist())
        return index[found.indices].tolist(), draws.shape[1]


def digest_of(rows: list[dict[str, Any]]) -> str:
    """SHA-256 of the rows as a model sees them: tokens and labels, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


# --- from flags to files --------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """Check, look, simulate, tell.

    Raises:
        UsageError: a wrong call; nothing is written.
        RunError: a round failed, or the disk is full.
    """
    args, words = parse_args(argv)
    out = Path(args.out)
    check_place(out / MADE[0])
    simulation = Simulation(args, words)
    name_process(simulation.base)
    quiet_libraries()
    accelerator = program.build_accelerator(simulation.base)
    simulation.look(accelerator)
    stored = stored_flags(simulation.all_args)
    made = program.provenance(None) | {"command": ["scripts/active_learning.py", *argv]}
    log = RoundLog(out, simulation.plan, MADE)
    try:
        log.open(
            simulation.all_args,
            {
                "args": stored,
                "given": {key: stored[key] for key in simulation.all_args.given},
                "run": made,
                "training_rows": simulation.rows,
            },
        )
        simulation.run(log, accelerator)
        write(simulation.base, log, out, made)
    finally:
        log.close()


def write(base: Args, log: RoundLog, out: Path, made: dict[str, Any]) -> None:
    """Curves as text, table and plot, and on the terminal."""
    curves = curves_of(log.done)
    title = f"Active learning: {data_set_name(base.dataset)}, {base.model}, {base.modelwrapper}"
    told = {
        "command": shlex.join(["python", *made["command"]]),
        "commit": made["commit"] or "unknown",
    }
    texts = {"curves.md": markdown(curves, title, told), "curves.csv": comma_separated(curves)}
    for name, text in texts.items():
        write_atomically(out / name, lambda path, text=text: path.write_text(text, "utf-8"))
    with tempfile.TemporaryDirectory(prefix="curves-") as folder:
        plots = [Path(folder) / name for name in MADE[2:]]
        save_figure(title, lambda: draw(curves), *plots)
        for plot in plots:
            write_atomically(out / plot.name, lambda path, plot=plot: shutil.copyfile(plot, path))
    print("\n" + writable(terminal(curves), sys.stdout), flush=True)
    logger.info("Learning curves: %s", quoted(str(out / MADE[0])))


def run(argv: list[str] | None = None) -> int:
    """`main` for the command line: messages without a traceback, and an exit code."""
    told = "Interrupted; run the same command with --resume to go on."
    return run_script(main, argv, told)


if __name__ == "__main__":
    sys.exit(run())
