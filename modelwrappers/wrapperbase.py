"""The one training loop and the one evaluation that every method shares.

A method is a subclass that overrides one to three hooks (`add_arguments`, `sampling`,
`configure_optimizers`, `training_step`, `optimizer_step`, `fit_posterior`), or just
`forward_logits`. The way of a tensor:

    dataset.collate -> batch -> training_step -> forward_logits (B, N, C) -> mean NLL -> backward
    dataset.collate -> batch -> predict -> forward_logits (B, N, C) -> log_softmax -> by row index
                    -> posterior_predictive (n, C) -> utils.metrics.score -> Metrics
"""

from __future__ import annotations

import inspect
import math
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import send_to_device
from huggingface_hub import HfApi
from jaxtyping import Float, Int
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import PreTrainedModel

from modelwrappers.engine.model_card import model_card
from modelwrappers.engine.posterior import (
    ADAPTER_FILE,
    BASE_MODEL_FLAGS,
    CONFIG_FILE,
    FORMAT_VERSION,
    RECORD_FILE,
    ROW_FLAGS,
    PosteriorRecord,
    Rows,
    Scores,
    check_adapter_tensors,
    read_adapter_tensors,
)
from modelwrappers.lora.backbone import head_roots
from modelwrappers.lora.exact_4bit import use_exact_4bit
from modelwrappers.lora.sharding import shard_base, sharded_names, shards_base
from utils.errors import RunError, UsageError, quoted
from utils.files import disk_errors, remove_folder, write_atomically, write_json, write_tensors
from utils.interrupts import Interrupted, interrupts
from utils.logging import logger
from utils.metrics import Metrics, posterior_predictive, score
from utils.optim import build_optimizer, linear_schedule
from utils.records import Record, as_record, read_tensors
from utils.run_folder import (
    RunFolder,
    check_data_set_name,
    predictions_file,
    run_folder_path,
)
from utils.run_state import StateRecord, check_alike, check_optimizer, check_parameters
from utils.seeding import mix_seed
from utils.temperature import fit_temperature, scale

Batch = dict[str, Tensor]


class Predictions(NamedTuple):
    """What a posterior says of a data set, in the data set's own order.

    Attributes:
        log_probs: log-probabilities of each draw, (n, N, C), float32.
        labels: (n,)
        index: (n,) rows in their split.
    """

    log_probs: Float[Tensor, "n N C"]
    labels: Int[Tensor, " n"]
    index: Int[Tensor, " n"]


class _TrainingView(nn.Module):
    """What DDP wraps: a view beside the wrapper whose forward is one training forward.

    The wrapper stays what it is: no `.module` in its way, no prefix in its state dict.
    """

    def __init__(self, wrapper: WrapperBase) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, batch: Batch, n_samples: int) -> Tensor:
        return self.wrapper.forward_logits(batch, sample=True, n_samples=n_samples)


class WrapperBase(PeftModel):
    """A LoRA model with a training loop, an evaluation and a posterior.

    Subclasses that are point estimates need nothing; Bayesian ones override `sampling` so that the
    stacked copies of a batch see different weights, and set `is_stochastic`.

    Args:
        model: a plain transformers model; PEFT injects its layers into it.
        peft_config: the LoRA configuration.
        args: parsed flags, read-only.
        accelerator: of this process.
        adapter_name: PEFT's name for the adapter.
    """

    is_stochastic = False  # whether draws differ; else one forward answers for any number of them
    has_members = False  # whether an adapter folder may hold several of them
    # what an adapter's folder holds, by exact name; {n} stands for a number
    adapter_files: ClassVar[tuple[str, ...]] = (ADAPTER_FILE, CONFIG_FILE, RECORD_FILE)
    learning_rate_flags: ClassVar[tuple[str, ...]] = ("--lr",)  # of its optimizers, for messages
    posterior_flags: ClassVar[tuple[str, ...]] = ()  # flags that a saved posterior needs again
    Description: ClassVar[type[Record]] = Record  # the type of what `method_config` says

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: PeftConfig,
        args,
        accelerator,
        adapter_name: str = "default",
    ) -> None:
        use_exact_4bit(model)  # it may be one that somebody else has loaded
        roots = head_roots(model)  # before PEFT puts its layers in
        forward_parameters = inspect.signature(model.forward).parameters
        peft_config.base_model_name_or_path = peft_config.base_model_name_or_path or args.model
        super().__init__(model, peft_config, adapter_name)
        self.args = args
        self.accelerator = accelerator
        self.is_causal = args.model_type == "causallm"
        self.target_ids: Tensor | None = None
        self.run_folder = RunFolder(
            run_folder_path(args),
            accelerator.process_index,
            accelerator.num_processes,
            self.adapter_files,
        )
        self.predictions: Predictions | None = None
        self.answers: list[str] | None = None  # the C choices, in label order
        self.results: dict[str, dict[str, Any]] = {}  # data set -> its block of metrics.json
        self.fitted_temperature: float | None = None  # by this run, or by the loaded posterior's
        self.temperature: float | None = None  # what `predict` divides the logits by
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.schedulers: dict[str, torch.optim.lr_scheduler.LRScheduler] = {}
        self.eval_n_samples = self.final_draws()  # N of `evaluate`
        self.step = 0  # optimizer updates done
        self._takes_position_ids = self.is_causal and "position_ids" in forward_parameters
        # DeBERTa sends its table of relative positions, which has no row per example, through the
        # adapted projections: no stack of draws can be split there.
        self._shares_positions = model.config.model_type.startswith("deberta")
        self._takes_logits_to_keep = self.is_causal and "logits_to_keep" in forward_parameters
        self._epoch = 0
        self._position = (0, 0)  # epoch, and batches of it that were consumed
        self._loss_weight = 1.0
        self._resumed = False
        self._saved_at = 0  # the update whose state is on disk
        self._evaluation_due = False  # by a resumed run, before the next update
        self._is_told_to_stop = False  # by a signal to one of several processes
        self._wandb_logger = None
        self._is_sharded = False
        self._refuse_to_generate(model)
        self._trained_base_layers = self._train_head_under_lora(roots)

    # --- hooks ------------------------------------------------------------------------------------

    @classmethod
    def add_arguments(cls, parser) -> None:
        """Add the method's own flags to the parser."""

    @classmethod
    def check_arguments(cls, args) -> None:
        """Fill in the method's defaults and raise `UsageError` on flags that contradict it."""

    def sampling(self, n_samples: int) -> AbstractContextManager:
        """Context in which a batch stacked `n_samples` times sees that many draws of the weights.

        0 means the posterior mean. Contexts nest: an inner one of the same number is no change.
        """
        return nullcontext()

    def configure_optimizers(self) -> None:
        """Fill `optimizers` and `schedulers`; called once, when every parameter exists."""
        args = self.args
        optimizer = build_optimizer(
            self.trainable_parameters(), args.opt, args.lr, args.opt_wd, args.adam_epsilon
        )
        self.optimizers = {"lora": optimizer}
        self.schedulers = {
            "lora": linear_schedule(optimizer, self.num_training_steps, args.warmup_ratio)
        }

    def training_step(self, batch: Batch) -> dict[str, float | Tensor]:
        """Forward and backward of one batch: the mean over draws of the mean NLL of the labels.

        Returns:
            what to log; "nll" is the loss that is watched for NaN.
        """
        labels = batch["labels"]
        num_draws = self.args.bayes_train_n_samples if self.is_stochastic else 1
        # Open around backward, too: gradient checkpointing runs the forward again in there.
        with self.sampling(num_draws):
            logits = self.training_logits(batch, num_draws)  # (B, N, C)
            nll = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.repeat_interleave(logits.shape[1])
            )
            self.backward(nll)
        predicted = logits.detach().float().softmax(-1).mean(1).argmax(-1)
        return {"nll": nll.detach(), "acc": (predicted == labels).float().mean()}

    def optimizer_step(self) -> dict[str, float | Tensor]:
        """One update from the gradients that the batches of this update have left."""
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for scheduler in self.schedulers.values():
            scheduler.step()
        return {}

    def fit_posterior(self) -> None:
        """Post-hoc methods: make the trained or loaded adapter Bayesian.

        Called once, after training if there is any, before the evaluation.
        """

    def check_own_data(self) -> None:
        """For `fit_posterior`: the data are those that the adapter was trained on.

        Raises:
            UsageError: --dataset is a shifted set.
        """
        args = self.args
        source = args.ood_ori_dataset or args.adapter_dataset
        if args.load_lora_path is not None and source not in (None, args.dataset):
            raise UsageError(
                f"--modelwrapper {args.modelwrapper} fits the posterior on the adapter's own data, "
                f"{source}, but --dataset is {args.dataset}; pass --dataset {source} "
                f"--ood-datasets {args.dataset}, or fit it first and load that run."
            )

    def method_state(self) -> dict[str, Any]:
        """What else a resumed run needs: counters and buffers that are no parameters."""
        return {}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `method_state`."""

    def method_config(self) -> dict[str, Any]:
        """The method's part of bayes_config.json: what makes the adapter Bayesian."""
        return {}

    def take_posterior(self, folder: Path, record: PosteriorRecord | None) -> None:
        """Called once the weights of an adapter are loaded: make them this method's posterior.

        Args:
            folder: where the adapter lies.
            record: what its bayes_config.json says, if this method made it and nothing is trained
                on top; None for any other adapter.
        Raises:
            UsageError: the record or a file of the posterior is damaged.
        """

    def described(self, record: PosteriorRecord, where: str) -> Record:
        """The method's own part of a record, checked; `where` begins the message if it is not."""
        return as_record(record.method, self.Description, where, "Fit the posterior again.")

    # --- logits -----------------------------------------------------------------------------------

    def forward_logits(
        self, batch: Batch, sample: bool = True, n_samples: int = 1, **kwargs
    ) -> Float[Tensor, "B N C"]:
        """Class logits, one slice per posterior draw.

        All draws are one forward: the batch is stacked N times and each stochastic layer splits it
        again. No more than --eval-batch-size rows are stacked at once, outside of training.

        Args:
            batch: model inputs, `input_ids (B, T)` and so on, without labels and index.
            sample: False for the posterior mean (N = 1).
            n_samples: N, the number of draws.
        Returns:
            (B, N, C)
        """
        num_draws = n_samples if sample and self.is_stochastic else 0
        if num_draws == 0:
            with self.sampling(0):
                return self._batch_logits(batch).unsqueeze(1)
        rows = batch["input_ids"].shape[0]
        most = num_draws if self.training else max(1, self.args.eval_batch_size // rows)
        if self._shares_positions:
            most = 1
        slices = []
        with self._in_step(-(-num_draws // most), batch):
            for start in range(0, num_draws, most):
                draws = min(most, num_draws - start)
                stacked = {key: torch.cat([value] * draws) for key, value in batch.items()}
                with self.sampling(draws):
                    logits = self._batch_logits(stacked)  # (N*B, C)
                slices.append(logits.unflatten(0, (draws, rows)))
        return torch.cat(slices).transpose(0, 1)  # (B, N, C)

    def _batch_logits(self, batch: Batch, **kwargs) -> Float[Tensor, "B C"]:
        if self._takes_logits_to_keep:
            # The answer is one token: the head need not be applied to the others.
            kwargs["logits_to_keep"] = 1
        # `adapter_names` are understood by PeftModel.forward only.
        model = super().forward if "adapter_names" in kwargs else self.base_model
        return self.class_logits(model(**batch, **kwargs))

    @contextmanager
    def _in_step(self, forwards: int, batch: Batch) -> Iterator[None]:
        """Context of `forwards` forwards, as many as the process with the most runs.

        A sharded base is gathered by all processes together, but how many draws are stacked at once
        depends on a batch's rows, and the last batch has fewer.
        """
        missing = 0
        if self._is_sharded and not self.training:
            most = torch.tensor(forwards, device=self.accelerator.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            missing = int(most) - forwards
        yield
        for _ in range(missing):
            with self.sampling(0):
                self._batch_logits(batch)

    def class_logits(self, output) -> Float[Tensor, "B C"]:
        """The logits of the C classes in a model's output.

        For a causal LM those of the answer tokens at the last position (rows are padded on the
        left), for a classifier all.
        """
        if not self.is_causal:
            return output.logits
        if self.target_ids is None:
            raise RunError("class_logits needs target_ids; call prepare_for_fit_evaluate first.")
        return output.logits[:, -1, self.target_ids]

    def model_inputs(self, batch: Batch) -> Batch:
        """A batch without labels and index, as the model reads it.

        For a causal LM the last position must be a real token, because that is where the answer is
        read: rows that are padded on the right are turned round to be padded on the left. Positions
        count from the first real token.

        Raises:
            RunError: a row has no token (told where that costs no wait for a GPU).
        """
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
        if self.is_causal and "attention_mask" in inputs:
            inputs = _padded_on_the_left(inputs)
        if self._takes_position_ids:
            positions = inputs["attention_mask"].cumsum(-1) - 1
            inputs["position_ids"] = positions.clamp(min=0)
        return inputs

    def training_logits(self, batch: Batch, n_samples: int = 1) -> Float[Tensor, "B N C"]:
        """`forward_logits` by way of the view that synchronises gradients between processes."""
        with self.accelerator.autocast():
            return _with_draws(self._view(self.model_inputs(batch), n_samples))

    def backward(self, loss: Tensor) -> None:
        """Add this batch's share to the gradients of the current update."""
        self.accelerator.backward(loss * self._loss_weight)

    def _refuse_to_generate(self, model: PreTrainedModel) -> None:
        """Let `generate` of a posterior raise, by whatever way it is reached, until it is built.

        The base model generates with the adapter that PEFT has put into it, so this is where it
        would use a single set of weights without a word. Point estimates generate as PEFT's do.
        """
        model.__dict__.pop("generate", None)  # of an earlier wrapper around the same model
        if self.final_draws() and hasattr(model, "generate"):
            model.generate = partial(_generate, model, self.args.modelwrapper)

    # --- parameters -------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Updates done in the whole run."""
        return self.step

    def state_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of what a resumed run needs."""
        return self.trainable_parameters()

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is trained."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def _train_head_under_lora(self, roots: list[str]) -> list[str]:
        """Train the base weights of a classification head that has LoRA on it.

        Without LoRA PEFT trains and saves a copy of the head (`modules_to_save`). PEFT cannot do
        both to one module, and a new head must not stay random: so its base weights are trained in
        place, under the names that PEFT gives them, and ride along in the adapter file.
        """
        trained = []
        for name, module in self.named_modules():
            path = f"{name.removeprefix('base_model.model.')}."
            if not any(path.startswith(f"{root}.") for root in roots):
                continue
            has_parameters = next(module.parameters(recurse=False), None) is not None
            is_saved_by_peft = any(part in name for part in (".lora_", ".modules_to_save")) or any(
                hasattr(self.get_submodule(parent), "modules_to_save") for parent in _parents(name)
            )
            if has_parameters and not is_saved_by_peft:
                module.requires_grad_(True)
                trained.append(name)
        return trained

    def _trained_base_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name in self._trained_base_layers
            for key, value in self.get_submodule(name).state_dict().items()
        }

    def settle(self) -> None:
        """Move to this process's device; with FSDP the frozen base in parts."""
        accelerator = self.accelerator
        if not shards_base(accelerator):
            self.to(accelerator.device)
            return
        whole = {parameter for _, parameter in self.state_parameters()}
        shard_base(self.get_base_model(), whole, accelerator.device, accelerator.num_processes)
        self._is_sharded = True

    # --- preparing --------------------------------------------------------------------------------

    def prepare_for_fit_evaluate(self, dataset, wandb_logger=None) -> None:
        """Take loaders and answer tokens from a data set; build optimizers and schedules.

        Args:
            dataset: has `train_dataloader`, `test_dataloader`, `num_samples`, `num_labels`,
                `target_ids`.
            wandb_logger: a wandb run of your own to log to, if any.
        """
        args = self.args
        self.dataset = dataset
        self._wandb_logger = wandb_logger
        if self.is_causal:
            self.target_ids = dataset.target_ids.to(self.accelerator.device)
        if hasattr(dataset, "task"):
            self.answers = list(dataset.task.choices)
        if not self.is_causal and getattr(dataset, "pad_token_id", None) is not None:
            # a decoder with a classification head looks for the last token that is no padding
            self.base_model.config.pad_token_id = dataset.pad_token_id
        self.eval_loader = dataset.test_dataloader
        # Read now what is needed at the end: a missing file should not wait for the training.
        self.shifted = {
            name: (other, other.test_dataloader)
            for name, other in getattr(dataset, "ood_datasets", {}).items()
        }
        for name in self.shifted:
            check_data_set_name(name, "--ood-datasets")
        if args.temperature_scaling:
            self.held_out_loader = dataset.held_out_dataloader
        self.num_training_steps = self.last_step = args.max_train_steps
        if args.max_train_steps or args.n_epochs:
            self.train_loader = dataset.train_dataloader
            updates_per_epoch = -(-len(self.train_loader) // args.grad_accum_steps)
            self.num_training_steps = args.max_train_steps or args.n_epochs * updates_per_epoch
            self.last_step = self.num_training_steps
            if args.whole_epochs:  # the schedules have ended by then: learning rate 0
                self.last_step = -(-self.last_step // updates_per_epoch) * updates_per_epoch
            if args.early_stop_steps:
                self.last_step = min(self.last_step, args.early_stop_steps)
            self.configure_optimizers()
            self._renew_view()
        # What the generators give from here on is the method's noise: other on every process.
        torch.manual_seed(
            mix_seed("training noise", args.seed_sampling, self.accelerator.process_index)
        )

    # --- training ---------------------------------------------------------------------------------

    def fit(
        self, train_loader: Iterable[Batch], eval_loader: Iterable[Batch] | None = None
    ) -> None:
        """Train for `num_training_steps` updates, from the last state if the run is resumed.

        Args:
            train_loader: batches of the data set contract; iterated once per epoch.
            eval_loader: evaluated every --eval-per-steps updates, if given.
        Raises:
            RunError: the loss is not a number.
        """
        args = self.args
        last_step = self.last_step
        self._resume_once()
        self.train()
        progress = tqdm(
            total=last_step,
            initial=self.step,
            desc="train",
            disable=not self.accelerator.is_local_main_process,
            mininterval=1.0,
        )
        shown: dict[str, str] = {}
        # A signal lets the update end; the state is saved, and then the run ends.
        with progress, interrupts.deferred():
            if self._evaluation_due and eval_loader is not None:
                self._evaluate_while_training(eval_loader)
            for batches in self._updates(train_loader, last_step):
                started = time.perf_counter()
                rates = {key: s.get_last_lr()[0] for key, s in self.schedulers.items()}
                log = self._update(batches)
                self.step += 1
                record = {"step": self.global_step, "epoch": self._epoch, **log, "lr": rates}
                record["seconds"] = round(time.perf_counter() - started, 4)
                self.run_folder.append_history(record)
                self._track({f"train/{key}": value for key, value in log.items()} | {"lr": rates})
                shown["nll"] = f"{log['nll']:.3f}"
                progress.set_postfix(shown, refresh=False)
                progress.update()
                if self.step == last_step:
                    break
                is_evaluated = _is_due(self.step, args.eval_per_steps)
                self._evaluation_due = eval_loader is not None and is_evaluated
                self._stop_if_told()
                if self._evaluation_due:
                    metrics = self._evaluate_while_training(eval_loader)
                    shown |= {key: f"{value:.3f}" for key, value in metrics.items()}
                if _is_due(self.step, args.save_per_steps):
                    self._save_state()
                self._stop_if_told()
            # A run that is killed or interrupted while it evaluates need not train again.
            if args.save_per_steps or self.run_folder.is_open:
                self._save_state()
            self._stop_if_told()
        interrupts.raise_if_any()
        for parameter in self.parameters():
            parameter.grad = None

    def _stop_if_told(self) -> None:
        """End the run by SIGINT or SIGTERM, with a state to go on from.

        All processes do so after the same update: of several, `_to_floats` has told them.
        """
        told = interrupts.number is not None
        if self.accelerator.num_processes > 1:
            told = self._is_told_to_stop
        if told:
            self._save_state()
            raise Interrupted(interrupts.number or signal.SIGTERM)

    def _renew_view(self) -> None:
        """What `training_logits` goes through: with several processes DDP, over what trains now."""
        view: nn.Module = _TrainingView(self)
        if self.accelerator.num_processes > 1:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                view, sharded_names(view)
            )
            device = self.accelerator.device
            view = DistributedDataParallel(view, [device] if device.type == "cuda" else None)
        # Around nn.Module's bookkeeping: the view holds the wrapper, not the other way round.
        self.__dict__["_view"] = view

    def _updates(self, loader: Iterable[Batch], last_step: int) -> Iterator[list[Batch]]:
        """The batches of each update, epoch after epoch, from the current position."""
        while self.step < last_step:
            epoch, consumed = self._position
            self._epoch = epoch
            sampler = getattr(loader, "batch_sampler", None)
            if hasattr(sampler, "set_position"):
                sampler.set_position(epoch, consumed)
            batches: list[Batch] = []
            for batch in loader:
                batches.append(batch)
                consumed += 1
                if len(batches) == self.args.grad_accum_steps:
                    self._position = (epoch, consumed)
                    yield batches
                    batches = []
                    if self.step >= last_step:
                        return
            self._position = (epoch + 1, 0)
            if batches:  # the epoch's rest is an update of its own
                yield batches
            elif consumed == 0:
                raise RunError("the training loader gave no batch.")

    def _update(self, batches: list[Batch]) -> dict[str, float]:
        """Forward and backward of each batch, one optimizer step; the means to log."""
        num_rows = sum(len(batch["labels"]) for batch in batches)
        totals: dict[str, float | Tensor] = {}
        for position, batch in enumerate(batches):
            batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
            self._loss_weight = len(batch["labels"]) / num_rows
            is_last = position == len(batches) - 1
            no_sync = getattr(self._view, "no_sync", nullcontext)
            synchronise = nullcontext() if is_last else no_sync()
            with synchronise:
                values = self.training_step(batch)
            for key, value in values.items():
                totals[key] = totals.get(key, 0.0) + self._loss_weight * value
        told = {"told to stop": float(interrupts.number is not None)}
        totals = self._to_floats(totals | told)
        self._is_told_to_stop = totals.pop("told to stop") > 0
        if not all(map(math.isfinite, totals.values())):
            rows = [int(i) for batch in batches for i in batch["index"]]
            raise RunError(
                f"the training loss is {totals.get('nll')} at update {self.step + 1}, on the rows "
                f"{rows} of the training set, with the parameters that the update before left. "
                f"Look at those rows, or lower the learning rates "
                f"({', '.join(self.learning_rate_flags)})."
            )
        done = self._to_floats(self.optimizer_step())
        if not all(map(math.isfinite, done.values())):
            raise RunError(
                f"update {self.step + 1} gave {done}: the optimizers have diverged. Lower the "
                f"learning rates ({', '.join(self.learning_rate_flags)}); --resume goes on from "
                "the last state."
            )
        return totals | done

    def _to_floats(self, values: dict[str, float | Tensor]) -> dict[str, float]:
        """Means over the processes, in one transfer."""
        if not values:
            return {}
        device = self.accelerator.device
        stacked = torch.stack([torch.as_tensor(v, device=device).float() for v in values.values()])
        if self.accelerator.num_processes > 1:
            stacked = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(values, stacked.tolist(), strict=True))

    def _evaluate_while_training(self, loader: Iterable[Batch]) -> dict[str, float]:
        limited = _spread(loader, self.args.eval_steps) if self.args.eval_steps else loader
        final = self.eval_n_samples
        self.eval_n_samples = self.args.bayes_eval_n_samples if final else 0
        alone = self.accelerator.num_processes == 1  # others would wait for this process
        try:
            with interrupts.deferred(wait=not alone):
                metrics = self.evaluate(limited)._asdict()
        except Interrupted:
            self._save_state()  # the evaluation is due, and will be made by the resumed run
            raise
        finally:
            self.eval_n_samples = final
        self._evaluation_due = False
        self.run_folder.append_history({"step": self.global_step, "eval": metrics})
        self._track({f"eval/{key}": value for key, value in metrics.items()})
        return metrics

    def _track(self, values: dict[str, Any]) -> None:
        flat = {
            key if not isinstance(value, dict) else f"{key}/{inner}": number
            for key, value in values.items()
            for inner, number in (value if isinstance(value, dict) else {"": value}).items()
        }
        if self.accelerator.trackers:
            self.accelerator.log(flat, step=self.global_step)
        if self._wandb_logger is not None and self.accelerator.is_main_process:
            self._wandb_logger.log(flat)

    # --- state ------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        if self._saved_at == self.global_step:  # of this update, nothing has changed since
            return
        state = {
            "step": self.step,
            "position": list(self._position),
            "parameters": {name: p.detach() for name, p in self.state_parameters()},
            "optimizers": {key: o.state_dict() for key, o in self.optimizers.items()},
            "schedulers": {key: s.state_dict() for key, s in self.schedulers.items()},
            "method": self.method_state(),
            "evaluation_due": self._evaluation_due,
        }
        self.run_folder.save_state(self.global_step, state, self.accelerator.wait_for_everyone)
        self._saved_at = self.global_step

    def _resume_once(self) -> None:
        """Put the run's last state back, the first time that training begins.

        Raises:
            UsageError: there are states, but none that can be used.
        """
        if not self.args.resume or self._resumed:
            return
        self._resumed = True
        own = sum(p.numel() * p.element_size() for _, p in self.state_parameters())
        loaded = self.run_folder.load_state(self._take_state, self._all_agree, 64 * own + 2**30)
        if loaded is None:
            logger.info("--resume: there is no state in %s; starting.", self.run_folder.path)
            return
        _, restore_generators = loaded
        self._saved_at = self.global_step
        self.run_folder.cut_history(self.global_step, self._evaluation_due)
        logger.info("Resuming after update %d.", self.global_step)
        restore_generators()

    def _take_state(self, state: StateRecord, global_step: int) -> None:
        """Put a state in place.

        Raises:
            UsageError: it does not fit this run. What was put in place by then is replaced by the
                next one that is tried.
        """
        try:
            self.load_method_state(state.method)  # first: it may decide what is trained
        except Exception as error:  # a method's own, and what was stored may be anything
            raise UsageError(f"the method cannot take its part ({_told(error)})") from None
        self.step, self._position = state.step, tuple(state.position)
        if self.step > self.last_step or self.global_step != global_step:
            raise UsageError(f"its step is {state.step}, of {self.last_step} updates")
        self._check_position()
        parameters = dict(self.state_parameters())
        check_parameters(state.parameters, parameters)
        for kind, stored, ours in (
            ("optimizers", state.optimizers, self.optimizers),
            ("schedulers", state.schedulers, self.schedulers),
        ):
            if stored.keys() != ours.keys():
                raise UsageError(f"it has the {kind} {quoted(sorted(stored))}")
        for key, optimizer in self.optimizers.items():
            check_optimizer(state.optimizers[key], optimizer)
        for key, scheduler in self.schedulers.items():
            if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                check_alike(state.schedulers[key], scheduler.state_dict(), "schedulers")
        with torch.no_grad():
            for name, value in state.parameters.items():
                parameters[name].copy_(value)
        try:
            for key, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state.optimizers[key])
            for key, scheduler in self.schedulers.items():
                scheduler.load_state_dict(state.schedulers[key])
        except Exception as error:  # of a method's own optimizers
            raise UsageError(f"the optimizers cannot take their part ({_told(error)})") from None
        self._evaluation_due = state.evaluation_due

    def _check_position(self) -> None:
        """So many batches of so many epochs are no more than the updates that were made.

        Raises:
            UsageError: they are.
        """
        epoch, consumed = self._position
        batches, size = len(self.train_loader), self.args.grad_accum_steps
        done = epoch * -(-batches // size) + -(-consumed // size)
        if consumed > batches or done > self.step:
            raise UsageError(f"its position {epoch}, {consumed} is not that of update {self.step}")

    def _all_agree(self, yes: bool) -> bool:
        """Whether all processes say yes."""
        if self.accelerator.num_processes == 1:
            return yes
        vote = torch.tensor(float(yes), device=self.accelerator.device)
        return self.accelerator.reduce(vote, reduction="mean").item() == 1

    # --- evaluation -------------------------------------------------------------------------------

    def final_draws(self) -> int:
        """N of the final evaluation; 0 is the posterior mean."""
        if not self.is_stochastic or self.args.bayes_inference_notsample:
            return 0
        return self.args.bayes_eval_n_samples_final

    def predict(self, eval_loader: Iterable[Batch]) -> Predictions:
        """Log-probabilities of every draw for every row, on all processes, in row order.

        The draws are seeded by --seed-sampling and the batch: an evaluation repeats itself, does
        not disturb training, and does not depend on the number of processes.

        Raises:
            RunError: a logit is not finite; the rows are named.
        """
        num_draws = self.eval_n_samples
        was_training = self.training
        self.eval()
        device = self.accelerator.device
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        try:
            forked = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(devices=forked), torch.inference_mode():
                for batch in tqdm(
                    eval_loader,
                    desc="evaluate",
                    leave=False,
                    disable=not self.accelerator.is_local_main_process,
                    mininterval=1.0,
                ):
                    batch = send_to_device(batch, device, non_blocking=True)
                    torch.manual_seed(
                        mix_seed("evaluation", self.args.seed_sampling, int(batch["index"][0]))
                    )
                    with self.accelerator.autocast():
                        logits = self.forward_logits(
                            self.model_inputs(batch),
                            sample=num_draws > 0,
                            n_samples=max(1, num_draws),
                        )
                    log_probs = _with_draws(logits).float().log_softmax(-1)  # (B, N, C)
                    if self.temperature is not None:
                        log_probs = scale(log_probs, self.temperature).float()
                    parts.append((log_probs, batch["labels"], batch["index"]))
        finally:
            self.train(was_training)
        if not parts:
            raise RunError("the evaluation loader gave no batch.")
        log_probs, labels, index = (torch.cat(column) for column in zip(*parts, strict=True))
        return self._gather(log_probs, labels, index)

    def _gather(self, log_probs: Tensor, labels: Tensor, index: Tensor) -> Predictions:
        """All processes' rows, each once, sorted by index."""
        if self.accelerator.num_processes > 1:
            accelerator = self.accelerator
            index = accelerator.gather(accelerator.pad_across_processes(index, pad_index=-1))
            labels = accelerator.gather(accelerator.pad_across_processes(labels))
            log_probs = accelerator.gather(accelerator.pad_across_processes(log_probs))
        index, order = index.cpu().sort(stable=True)
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        keep = order[first & (index >= 0)]
        log_probs, labels = log_probs.cpu()[keep], labels.cpu()[keep]
        index = index[first & (index >= 0)]
        broken = ~log_probs.isfinite().flatten(1).all(1)
        if broken.any():
            raise RunError(
                f"the predictions of rows {index[broken].tolist()[:20]} are not numbers; the model "
                f"has diverged (lower {', '.join(self.learning_rate_flags)}) or the data type "
                "overflows (--dtype float32)."
            )
        return Predictions(log_probs, labels, index)

    def evaluate(self, eval_loader: Iterable[Batch]) -> Metrics:
        """Metrics of the posterior predictive over all rows; keeps the draws in `predictions`."""
        self.predictions = self.predict(eval_loader)
        return score(
            posterior_predictive(self.predictions.log_probs),
            self.predictions.labels,
            self.args.num_bins,
        )

    # --- the whole run ----------------------------------------------------------------------------

    def fit_evaluate(self) -> Metrics:
        """Train if there is anything to train, evaluate, and leave the results in the folder."""
        training_seconds = 0.0
        if self.num_training_steps:
            started = time.perf_counter()
            self.fit(self.train_loader, self.eval_loader if self.args.eval_per_steps else None)
            training_seconds = time.perf_counter() - started
        self.fit_posterior()
        if self.args.temperature_scaling:
            self.fitted_temperature = self._fit_temperature()
        temperature = self.fitted_temperature
        name, split = self.args.dataset.rpartition(":")[2], self.args.testing_set
        if split != "train_val":  # the others may name where anchors come from, too
            split = getattr(self.dataset, "eval_split", split)
        metrics = self._score_and_keep(
            self.eval_loader, name, split, predictions_file(), temperature
        )
        self._track({f"final/{key}": value for key, value in metrics._asdict().items()})
        self._evaluate_shifted(temperature)
        if self.args.checkpoint:
            for file in self.save_adapter(self.run_folder.files) or ():  # an overridden one
                self.run_folder.file(file)
        elif self.args.load_lora_path is not None:
            self.run_folder.keep_adapter_of(Path(self.args.load_lora_path))
        with interrupts.deferred():  # the run is finished: a signal has nothing left to end
            if self.accelerator.is_main_process:  # last: metrics.json says that it is finished
                self._write_results(training_seconds)
            self.accelerator.wait_for_everyone()
            self.run_folder.finish()
        return metrics

    def _evaluate_shifted(self, temperature: float | None) -> None:
        """The same posterior on every data set of --ood-datasets, with that set's answer tokens."""
        own_predictions, own_tokens = self.predictions, self.target_ids
        for name, (dataset, loader) in self.shifted.items():
            if self.is_causal:
                self.target_ids = dataset.target_ids.to(self.accelerator.device)
            file = predictions_file(name)
            metrics = self._score_and_keep(loader, name, dataset.eval_split, file, temperature)
            self._track({f"final/{name}/{key}": v for key, v in metrics._asdict().items()})
            logger.info("%s: ACC %.4f  ECE %.4f  NLL %.4f  Brier %.4f", name, *metrics)
        self.predictions, self.target_ids = own_predictions, own_tokens

    def _fit_temperature(self) -> float:
        """T from predictions on the part of the training set that was held out; they are kept."""
        predictions = self.predict(self.held_out_loader)
        name = self.args.dataset.rpartition(":")[2]
        self._write_predictions(predictions, name, "held_out", predictions_file("held_out"))
        return fit_temperature(predictions.log_probs, predictions.labels)

    def _write_predictions(
        self, predictions: Predictions, dataset: str, split: str, file: str
    ) -> None:
        if not self.accelerator.is_main_process:
            return
        self.run_folder.write_tensors(
            file,
            predictions._asdict(),
            {
                "dataset": dataset,
                "split": split,
                "seed": str(self.args.seed),
                "modelwrapper": self.args.modelwrapper,
            },
        )

    def _score_and_keep(
        self,
        loader: Iterable[Batch],
        dataset: str,
        split: str,
        file: str,
        temperature: float | None,
    ) -> Metrics:
        """Evaluate; keep the data set's block of metrics.json and its predictions."""
        started = time.perf_counter()
        metrics = Metrics(*map(float, self.evaluate(loader)))  # a method's own may give tensors
        broken = [key for key, value in metrics._asdict().items() if not math.isfinite(value)]
        if broken:
            raise RunError(
                f"the evaluation of {dataset} gave {metrics}: {', '.join(broken)} must be finite; "
                "look at the method's own `evaluate`. --resume goes on from the last state."
            )
        block: dict[str, Any] = metrics._asdict() | {
            "split": split,
            "num_bins": self.args.num_bins,
            "seconds": round(time.perf_counter() - started, 3),
        }
        if self.predictions is not None:  # an overridden `evaluate` may keep none
            log_probs, labels, _ = self.predictions
            block |= {"n_examples": len(labels), "n_draws": log_probs.shape[1]}
            if temperature is not None:
                scaled = posterior_predictive(scale(log_probs, temperature))
                block["temperature_scaled"] = {
                    "temperature": temperature,
                    **score(scaled, labels, self.args.num_bins)._asdict(),
                }
            self._write_predictions(self.predictions, dataset, split, file)
        self.results[dataset] = block
        return metrics

    def _write_results(self, training_seconds: float) -> None:
        args = self.args
        self.run_folder.write_metrics(
            {
                "modelwrapper": args.modelwrapper,
                "model": args.model,
                "seed": args.seed,
                "updates": self.global_step,
                "training_seconds": round(training_seconds, 3),
                "peak_memory_bytes": peak_memory(self.accelerator.device),
                "datasets": self.results,
            },
        )

    # --- adapters on disk -------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As PEFT's, with bayes_config.json and a model card; `push_to_hub` sends what this writes.

        A LoRA on the head does not drag the base model's whole head along; base weights of a
        classification head that were trained under its LoRA are added.
        """
        kwargs.setdefault("save_embedding_layers", False)
        super().save_pretrained(save_directory, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        config = self.bayes_config()
        write_json(Path(save_directory) / RECORD_FILE, config)
        (Path(save_directory) / "README.md").write_text(model_card(config), encoding="utf-8")
        extra = self._trained_base_tensors()
        if extra:
            file = Path(save_directory) / ADAPTER_FILE
            write_tensors(file, read_tensors(file, "adapter") | extra, {"format": "pt"})

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        """What PEFT writes into adapter_config.json: not the subclass that FSDP makes of it."""
        cls = super()._get_base_model_class(is_prompt_tuning)
        return next(base for base in cls.__mro__ if not issubclass(base, FSDPModule))

    def push_to_hub(self, repo_id: str, private: bool | None = None, token=None, **kwargs) -> str:
        """Send adapter, posterior and model card to a hub repo, made if it does not exist.

        Args:
            repo_id: "owner/name".
            private: whether a new repo is private; None leaves it to the owner's settings.
            token: of the hub; None takes the stored one.
            kwargs: of `HfApi.upload_folder`, such as `commit_message` and `path_in_repo`.
        Returns:
            the commit's address.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))

    def save_adapter(self, folder: Path) -> list[str]:
        """Adapter and bayes_config.json, each file replaced in one step (on the main process).

        Returns:
            the names of the files, relative to `folder`.
        Raises:
            RunError: the disk is full or cannot be written.
        """
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return []
        temporary = folder / ".adapter"
        try:
            with disk_errors(folder / ADAPTER_FILE):
                self.save_pretrained(str(temporary))
            # An ensemble's members are subfolders. What describes the files comes after them.
            files = sorted(temporary.rglob("*"), key=lambda file: (file.suffix == ".json", file))
            files = [file for file in files if file.is_file() and file.name != "README.md"]
            for file in files:
                write_atomically(folder / file.relative_to(temporary), file.replace)
        finally:
            remove_folder(temporary)
        logger.info("Adapter saved to %s", folder)
        return [str(file.relative_to(temporary)) for file in files]

    def bayes_config(self) -> dict[str, Any]:
        """What makes the adapter Bayesian, and what it takes to predict with it.

        It is a `PosteriorRecord`: what is written here is what `read_posterior_record` takes.
        """
        args = self.args
        record = PosteriorRecord(
            format_version=FORMAT_VERSION,
            modelwrapper=args.modelwrapper,
            **{name: getattr(args, name) for name in BASE_MODEL_FLAGS},
            dataset=args.dataset,
            dataset_type=args.dataset_type,
            choices=self.answers,
            target_ids=self.target_ids.tolist() if self.target_ids is not None else None,
            pad_token_id=self.base_model.config.pad_token_id,
            rows=Rows(**{name: getattr(args, name) for name in ROW_FLAGS}),
            n_draws=max(1, self.final_draws()),
            temperature=self.fitted_temperature,
            metrics={name: Scores.model_validate(block) for name, block in self.results.items()},
            flags={name: getattr(args, name) for name in self.posterior_flags},
            **self.method_config(),
        )
        return record.model_dump()

    def load_adapter_weights(self, folder: Path, adapter_name: str = "default") -> None:
        """Fill the adapter from a folder that this project, PEFT or the original code wrote.

        Keys of the original carry their prefix twice and may bring the base model's whole head;
        the one is undone, the other left out.

        Raises:
            UsageError: a tensor is missing or has another shape: another architecture or rank.
        """
        members = sorted(folder.glob("member*/adapter_config.json"))
        if members and not self.has_members:
            raise UsageError(
                f"--load-lora-path: {folder} holds a deep ensemble of {len(members) + 1} members; "
                f"--modelwrapper {self.args.modelwrapper} takes one of them, e.g. "
                f"{members[0].parent}, or pass --modelwrapper deepensemble."
            )
        tensors = self._adapter_tensors(read_adapter_tensors(folder, "--load-lora-path"))
        expected = (
            get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
            | self._trained_base_tensors()
        )
        if any(".lora_A_rho" in key for key in tensors.keys() - expected.keys()):
            logger.info(
                "%s holds the spread of a Gaussian posterior; --modelwrapper %s takes its mean.",
                folder,
                self.args.modelwrapper,
            )
        check_adapter_tensors(tensors, expected, folder, self.args.model)
        trained = {key: tensors[key] for key in self._trained_base_tensors()}
        self.load_state_dict(trained, strict=False)
        adapter = {key: tensors[key] for key in expected.keys() - trained.keys()}
        set_peft_model_state_dict(self, adapter, adapter_name=adapter_name)

    def _adapter_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hook: what of an adapter's tensors is loaded; a method adds what it can do without."""
        return tensors


# --- small helpers -------------------------------------------------------------------------------


def _padded_on_the_left(inputs: Batch) -> Batch:
    """Every row moved to the right by the padding behind its last token."""
    mask = inputs["attention_mask"]
    if mask.device.type == "cpu" and not mask.any(-1).all():
        raise RunError("a row of the batch is padding only: attention_mask is 0 everywhere in it.")
    width = mask.shape[-1]
    behind = mask.flip(-1).ne(0).int().argmax(-1, keepdim=True)  # (B, 1)
    source = (torch.arange(width, device=mask.device) - behind) % width  # (B, T)
    return {
        key: value.gather(-1, source) if value.shape == mask.shape else value
        for key, value in inputs.items()
    }


def _with_draws(logits: Tensor) -> Float[Tensor, "B N C"]:
    """A subclass may return (B, C): one draw."""
    return logits.unsqueeze(1) if logits.dim() == 2 else logits


def adapter_acts(model: nn.Module) -> bool:
    """Whether a forward goes through LoRA: it is there, and neither merged nor disabled."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return bool(layers) and not any(layer.merged or layer.disable_adapters for layer in layers)


def _generate(model: PreTrainedModel, method: str, *args, **kwargs):
    """`model.generate`, unless the adapter in it is a posterior whose draws differ."""
    if adapter_acts(model):
        raise UsageError(
            f"generate: the adapter is a posterior ({method}), and text cannot be generated from "
            "its draws yet; a single set of weights would be used without saying so. To have just "
            "that, call merge_adapter() first (the posterior mean; of an ensemble the active "
            "member), or generate with the base model inside of disable_adapter()."
        )
    return type(model).generate(model, *args, **kwargs)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _spread(loader: Iterable[Batch], number: int) -> Iterator[Batch]:
    """`number` batches from all over: the first ones would be the longest rows."""
    chosen = {round(i * len(loader) / number) for i in range(number)}
    return (batch for position, batch in enumerate(loader) if position in chosen)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
