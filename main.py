"""Fine-tune a language model with LoRA and a Bayesian method, and measure its calibration.

    python main.py --dataset-type mcdataset --dataset bbc_headlines --model smollm2-135m \
        --modelwrapper mle --max-train-steps 40 --batch-size 8 --lr 5e-4 --nowand
    accelerate launch main.py ...            # several GPUs
    python main.py --config RUN/args.json    # a stored run again

The path below is the whole program: flags, data, model and method, training and evaluation, files.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from dataset import build_dataset, check_data_sets
from modelwrappers import build_wrapper, get_wrapper
from modelwrappers.sharding import check_sharding, shards_base
from utils.args import Args, build_parser, finish, first_pass
from utils.commit import current_commit
from utils.errors import RunError, UsageError
from utils.files import write_json
from utils.logging import check_tracker, init_tracker, logger, name_process, setup_logging
from utils.metrics import Metrics
from utils.run_folder import RunFolder, run_folder_path

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "torchmetrics",
)


def parse_args(argv: list[str] | None = None) -> Args:
    """The checked, read-only flags: method first, then one strict parser with that method's own."""
    argv = sys.argv[1:] if argv is None else list(argv)
    method, config = first_pass(argv)
    wrapper = get_wrapper(method) if method else get_wrapper("map")
    parser = build_parser(wrapper.add_arguments)
    args = parser.parse_strictly(argv, config, "--config")
    return finish(args, parser, wrapper.check_arguments)


def main(argv: list[str] | None = None) -> Metrics:
    """One run, from flags to files.

    Raises:
        UsageError: the call cannot work as it was made.
        RunError: the run failed.
    """
    setup_logging(is_main_process=os.environ.get("RANK", "0") == "0")
    args = parse_args(argv)
    check_data_sets(args)
    name_process(args)
    check_tracker(args)
    accelerator = build_accelerator(args)
    folder = open_run_folder(args, accelerator)
    if args.resume and (finished := folder.finished()):
        logger.info("%s is finished; nothing to resume.", folder.path)
        return Metrics(*(finished[args.dataset.rpartition(":")[2]][k] for k in Metrics._fields))

    set_seed(args.seed)
    dataset = build_dataset(args, accelerator)
    wrapper = build_wrapper(args, dataset.num_labels, accelerator)
    wrapper.prepare_for_fit_evaluate(dataset)
    begin_run(folder, args, accelerator)
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


def build_accelerator(args: Args) -> Accelerator:
    """This process's device and its neighbours.

    Raises:
        UsageError: no GPU where one was asked for; fp16 autocast, whose scaled gradients do not
            mix with gradients of a KL term; a quantised base under FSDP.
    """
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


def open_run_folder(args: Args, accelerator: Accelerator) -> RunFolder:
    """The run's folder, checked for space and for an earlier run."""
    folder = RunFolder(run_folder_path(args), accelerator.process_index, accelerator.num_processes)
    if accelerator.is_main_process:
        folder.check_writable()
        folder.check_against_earlier_run(args)
    accelerator.wait_for_everyone()
    setup_logging(accelerator.is_main_process, folder.path / "log.txt")
    return folder


def begin_run(folder: RunFolder, args: Args, accelerator: Accelerator) -> None:
    """args.json and log.txt begin anew, and what an earlier run has left goes.

    Not before data and model are there: a call that cannot work takes nothing away.
    """
    if args.resume and folder.states:
        return
    if accelerator.is_main_process:
        source = Path(args.load_lora_path or ".").resolve()
        folder.clear(keep_adapter=source == folder.path.resolve())
        stored = {
            "args": args.as_dict(),
            "given": args.given,
            "run": provenance() | {"num_processes": accelerator.num_processes},
        }
        write_json(folder.path / "args.json", stored)
    accelerator.wait_for_everyone()
    setup_logging(accelerator.is_main_process, folder.path / "log.txt")


def provenance() -> dict[str, Any]:
    """What made this run: command, versions, commit, host, time."""
    return {
        "command": sys.argv,
        "commit": current_commit(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }


def run(argv: list[str] | None = None) -> int:
    """`main` for the command line: messages without a traceback, and an exit code."""
    try:
        main(argv)
    except (UsageError, RunError) as error:
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except torch.OutOfMemoryError as error:
        logger.error(
            "RunError: the GPU's memory is full (%s). Lower --batch-size or --eval-batch-size, or "
            "pass --gradient-checkpointing or --quantization 4bit; --resume goes on from the last "
            "state.",
            str(error).partition(".")[0],
        )
        return RunError.exit_code
    except SystemExit:
        if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
            raise
        # whatever its code was: a run that did not come to its end must not look finished
        logger.error("RunError: code that the run calls has ended it by sys.exit().")
        return RunError.exit_code
    except KeyboardInterrupt:
        logger.error("Interrupted; run the same command with --resume to go on.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
