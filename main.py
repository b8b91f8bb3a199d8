"""Fine-tune a language model with LoRA and a Bayesian method, and measure its calibration.

    python main.py --dataset-type mcdataset --dataset bbc_headlines --model smollm2-135m \
        --modelwrapper mle --max-train-steps 40 --batch-size 8 --lr 5e-4 --nowand
    accelerate launch main.py ...            # several GPUs
    python main.py --config RUN/args.json    # a stored run again

The path below is the whole program: flags, data, model and method, training and evaluation, files.
"""

from __future__ import annotations

import gc
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

import modelwrappers
from dataset import build_dataset, check_data_sets
from utils.args import Args, asks_for_help, build_parser, check_shared, finish, first_pass
from utils.commit import current_commit
from utils.data_set_names import data_set_name
from utils.errors import RunError, UsageError
from utils.interrupts import Interrupted, interrupts
from utils.logging import (
    check_tracker,
    init_tracker,
    logger,
    name_process,
    quiet_libraries,
    setup_logging,
)
from utils.processes import on_main_process, process_number
from utils.program import run_program
from utils.run_paths import run_folder_path
from utils.run_records import LOG_FILE, METRICS_FILE, read_metrics_record, stored_flags

# Torch and the libraries on it take seconds to import: functions that run after the call was
# checked do that.
if TYPE_CHECKING:
    from accelerate import Accelerator

    from dataset.base import DatasetBase
    from modelwrappers.wrapperbase import WrapperBase
    from utils.metrics import Metrics
    from utils.run_folder import RunFolder

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "torchmetrics",
)


def parse_args(
    argv: list[str] | None = None, check_early: Callable[[Args], None] = lambda early: None
) -> Args:
    """The checked, read-only flags; `--help` prints them and ends the program.

    Args:
        argv: the command line; None: that of the program.
        check_early: of the shared flags, before the method is imported, which takes seconds.
    Raises:
        UsageError: an unknown flag or method, a broken rule, missing flags or contradictions.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    method, config = first_pass(argv)
    if method is not None:
        modelwrappers.check_method_name(method)
    if not asks_for_help(argv):
        early = check_shared(argv, method, config, modelwrappers.catalogue())
        if early is not None:
            check_early(early)
    elif method is None:
        build_parser(lambda parser: None, modelwrappers.catalogue().listed()).parse_args(argv)
    with first_imports():
        wrapper = modelwrappers.get_wrapper(method)
    parser = build_parser(wrapper.add_arguments)
    args = parser.parse_strictly(argv, config, "--config", flags_of_other_methods)
    return finish(args, parser, wrapper.check_call)


@contextmanager
def first_imports() -> Iterator[None]:
    """Context without garbage collection, which afterwards leaves alone what is there by then.

    Torch and PEFT make objects by the million when they are imported, and no garbage: to look for
    some took a fifth of the time of a short call, once in here and once more at its end. Only where
    nothing of them is there yet: what else a process has made by then would never be freed.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def flags_of_other_methods() -> dict[str, str]:
    """Flag -> the first built-in method that has it."""
    owners: dict[str, str] = {}
    for name, wrapper in modelwrappers.WRAPPERS.items():
        for flag in build_parser(wrapper.add_arguments).flags:
            owners.setdefault(flag, name)
    return owners


def check_names(args: Args) -> None:
    """Names that would fail later, after data and model were loaded.

    Raises:
        UsageError: an unknown data set, a run folder or a tracker's name that cannot be.
    """
    check_data_sets(args)
    check_tracker(args)
    run_folder_path(args)


def main(argv: list[str] | None = None) -> Metrics:
    """One run, from flags to files.

    Raises:
        UsageError: the call cannot work as it was made.
        RunError: the run failed.
        Interrupted: by SIGINT or SIGTERM.
    """
    setup_logging(is_main_process=process_number() == 0)
    args = parse_args(argv, check_early=check_names)
    check_names(args)  # a method in a file has no early flags, and any may have changed them
    name_process(args)
    quiet_libraries()
    from utils.run_folder import RunFolder

    accelerator = build_accelerator(args)
    folder = RunFolder(
        run_folder_path(args),
        accelerator.process_index,
        accelerator.num_processes,
        modelwrappers.get_wrapper(args.modelwrapper).adapter_files,
    )
    with interrupts.handled():
        try:
            return run_in(folder, args, accelerator, argv)
        except KeyboardInterrupt as error:
            raise told_interruption(folder, error) from None
        finally:
            folder.close()


def run_in(
    folder: RunFolder, args: Args, accelerator: Accelerator, argv: list[str] | None
) -> Metrics:
    """The run that belongs into `folder`, unless it is there already."""
    folder.plan = on_main_process(accelerator, lambda: folder.open(args))
    if folder.plan.kept:
        return kept_metrics(folder, args)
    check_purpose(args)

    wrapper = assemble(args, accelerator)
    begin_run(folder, args, accelerator, argv)
    wrapper.run_folder = folder
    init_tracker(accelerator, args, folder.path)
    metrics = wrapper.fit_evaluate()
    accelerator.end_training()

    logger.info(
        "%s on %s: ACC %.4f  ECE %.4f  NLL %.4f  Brier %.4f",
        args.modelwrapper,
        args.dataset,
        *metrics,
    )
    logger.info("Run folder: %s", folder.path)
    return metrics


def assemble(
    args: Args,
    accelerator: Accelerator | None = None,
    choose_rows: Callable[[DatasetBase], None] = lambda dataset: None,
) -> WrapperBase:
    """From flags to a wrapper that is ready to fit and evaluate; its data are `wrapper.dataset`.

    The one way there, of runs, simulations, tests and benchmarks.

    Args:
        args: flags.
        accelerator: of this process; None: a new one.
        choose_rows: told the data set before anything takes its rows: `DatasetBase.train_on`.
    """
    from accelerate.utils import set_seed

    accelerator = accelerator or build_accelerator(args)
    set_seed(args.seed)
    dataset = build_dataset(args, accelerator)
    choose_rows(dataset)
    wrapper = modelwrappers.build_wrapper(args, dataset.num_labels, accelerator)
    wrapper.prepare_for_fit_evaluate(dataset)
    return wrapper


def check_purpose(args: Args) -> None:
    """There is something to train or something trained to evaluate.

    Raises:
        UsageError: a new adapter would be evaluated as it was initialised.
    """
    if args.load_lora_path is None and not (args.max_train_steps or args.n_epochs):
        raise UsageError(
            "there is nothing to train (--max-train-steps and --n-epochs are 0) and no adapter to "
            "evaluate; pass a length, or --load-lora-path."
        )


def build_accelerator(args: Args) -> Accelerator:
    """This process's device and its neighbours.

    Raises:
        UsageError: no GPU where one was asked for; fp16 autocast, whose scaled gradients do not
            mix with gradients of a KL term; a quantised base under FSDP.
    """
    import torch
    from accelerate import Accelerator

    from modelwrappers.lora.sharding import check_sharding, shards_base

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: there is no CUDA device here; drop it or pass --device cpu."
        )
    accelerator = Accelerator(
        cpu=True if args.device == "cpu" else None,
        log_with=None if args.tracker == "none" else args.tracker,
        project_dir=run_folder_path(args),
    )
    if accelerator.mixed_precision == "fp16":
        raise UsageError(
            "mixed precision fp16 scales the loss, which the two-optimizer methods cannot undo; "
            "launch with --mixed_precision bf16 or no."
        )
    if shards_base(accelerator):  # before any data are read
        check_sharding(args)
    return accelerator


def kept_metrics(folder: RunFolder, args: Args) -> Metrics:
    """What the finished run has measured."""
    from utils.metrics import Metrics

    file = folder.path / METRICS_FILE
    name = data_set_name(args.dataset)
    blocks = read_metrics_record(file, "--log-path").datasets
    if name not in blocks:
        raise UsageError(
            f"{file} has no metrics of {name}; restore it, or pass --overwrite to make the run "
            "again."
        )
    logger.info("%s is finished: it is kept as it is (--overwrite replaces it).", folder.path)
    return Metrics(*(getattr(blocks[name], key) for key in Metrics._fields))


def begin_run(
    folder: RunFolder, args: Args, accelerator: Accelerator, argv: list[str] | None
) -> None:
    """The folder is made and args.json and log.txt begin.

    Not before data and model are there: a call that cannot work leaves nothing.
    """
    stored = {
        "args": stored_flags(args),
        "given": {key: stored_flags(args)[key] for key in args.given},
        "run": provenance(argv) | {"num_processes": accelerator.num_processes},
    }
    on_main_process(accelerator, lambda: folder.begin(args, stored))
    folder.is_open = True
    setup_logging(accelerator.is_main_process, folder.files / LOG_FILE)


def told_interruption(folder: RunFolder, error: KeyboardInterrupt) -> Interrupted:
    """The interruption, with a message that promises no more than there is."""
    number = error.number if isinstance(error, Interrupted) else signal.SIGINT
    state = folder.states[-1:] if folder.is_open else []
    if state:
        message = (
            f"Interrupted; the state of {state[0].name} is kept: run the same command with "
            "--resume (without --overwrite) to go on from it."
        )
    else:
        message = "Interrupted before there was a state; run the command again to start over."
    return Interrupted(number, message)


def provenance(argv: list[str] | None) -> dict[str, Any]:
    """What made this run: command, versions, commit, host, time."""
    return {
        "command": sys.argv if argv is None else ["main.py", *argv],
        "commit": current_commit(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }


def run(argv: list[str] | None = None) -> int:
    """`main` for the command line: messages without a traceback, and an exit code."""
    try:
        return run_program(lambda: main(argv))
    except SystemExit:
        if asks_for_help(sys.argv[1:] if argv is None else argv):
            raise
        # whatever its code was: a run that did not come to its end must not look finished
        logger.error("RunError: code that the run calls has ended it by sys.exit().")
        return RunError.exit_code


if __name__ == "__main__":
    sys.exit(run())
