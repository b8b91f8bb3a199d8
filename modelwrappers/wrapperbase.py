"""What every method shares: class logits of a LoRA model, and the verbs of a run.

A method is a subclass that overrides one to three hooks (`add_arguments`, `sampling`, `loss`,
`configure_optimizers`, `optimizer_step`, `fit_posterior`), or just `forward_logits`. What runs a
wrapper lies in `modelwrappers/engine`: the loop (`training`), draws and rows (`prediction`), what
is kept of them (`results`), folder and hub (`posterior`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from jaxtyping import Float
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from modelwrappers.engine import (
    adapter_weights,
    posterior,
    prediction,
    results,
    training,
)
from modelwrappers.engine.adaptive import Settling
from modelwrappers.engine.answers import RowAnswers
from modelwrappers.engine.logits import ClassLogits
from modelwrappers.engine.method_flags import check_method_flags
from modelwrappers.engine.posterior import PosteriorRecord
from modelwrappers.engine.prediction import Batch, Predictions
from modelwrappers.engine.prefix import check_prefix
from modelwrappers.lora.backbone import facts_of, settle_generate
from modelwrappers.lora.blocks import find_blocks
from modelwrappers.lora.exact_4bit import use_exact_4bit
from modelwrappers.lora.heads import TrainedHead, head_roots, train_head_under_lora
from modelwrappers.lora.sharding import shard_base, shards_base
from modelwrappers.lora.stochastic import RHO
from utils.args import Args, check_own_data, check_settings, settings_of
from utils.errors import RunError, UsageError
from utils.metrics import Metrics, posterior_predictive, score
from utils.optim import build_optimizer, linear_schedule
from utils.records import Record, as_record
from utils.run_folder import RunFolder
from utils.run_paths import check_data_set_name, run_folder_path
from utils.seeding import mix_seed
from utils.table_task import TableTask


class WrapperBase(ClassLogits, RowAnswers, TrainedHead, PeftModel):
    """A LoRA model with a training loop, an evaluation and a posterior.

    Subclasses that are point estimates need nothing; Bayesian ones override `sampling` so that the
    stacked copies of a batch see different weights, and set `is_stochastic`.

    A run gives its parsed flags as `args`. Without a command line the same settings are keyword
    arguments, by the names of the flags in any of their spellings, and no run's folder is written:
    `BLoB(model, LoraConfig(...), prior_std=0.2, lr=1e-3)`.

    Args:
        model: a plain transformers model; PEFT injects its layers into it.
        peft_config: the LoRA configuration.
        args: parsed flags, read-only.
        accelerator: of this process; None for a new one on the model's device.
        adapter_name: PEFT's name for the adapter.
        settings: flags, instead of `args`.
    Raises:
        UsageError: a setting is not a flag of the method, or breaks its rule.
    """

    is_stochastic = False  # whether draws differ; else one forward answers for any number of them
    has_members = False  # whether an adapter folder may hold several of them
    # what an adapter's folder holds, by exact name; {n} stands for a number
    adapter_files: ClassVar[tuple[str, ...]] = posterior.FILES
    posterior_file = posterior.TENSORS_FILE  # which of them holds `posterior_tensors`
    learning_rate_flags: ClassVar[tuple[str, ...]] = ("--lr",)  # of its optimizers, for messages
    posterior_flags: ClassVar[tuple[str, ...]] = ()  # flags that a saved posterior needs again
    # ends of LoRA tensors' names that are of a posterior, beside the mean that any method takes
    posterior_suffixes: ClassVar[tuple[str, ...]] = (RHO,)
    Description: ClassVar[type[Record]] = Record  # the type of what `method_config` says

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: PeftConfig,
        args: Args | None = None,
        accelerator: Accelerator | None = None,
        adapter_name: str = "default",
        **settings,
    ) -> None:
        if args is None:
            check_settings(type(self), settings)
            args = settings_of(type(self), facts_of(model) | settings)
        elif settings:
            raise UsageError(f"{', '.join(settings)}: with `args` settings are flags in there.")
        use_exact_4bit(model)  # it may be one that somebody else has loaded
        roots = head_roots(model)  # before PEFT puts its layers in
        peft_config.base_model_name_or_path = peft_config.base_model_name_or_path or args.model
        super().__init__(model, peft_config, adapter_name)
        self.read_architecture(model, is_causal=args.model_type == "causallm")
        self.args = args
        self.accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu" or None)
        self.run_folder: RunFolder | None = None
        if args.output_dir is not None:
            process = self.accelerator.process_index, self.accelerator.num_processes
            self.run_folder = RunFolder(run_folder_path(args), *process, self.adapter_files)
        # what is predicted
        self.answers: list[str] | None = None  # the C choices, in label order
        self.prompt: posterior.Prompt | None = None  # what a row looks like
        self.recorded_answers: list[str] | None = None  # those of the loaded posterior's record
        self.table_task: TableTask | None = None  # what a user's own table asks
        self.fitted_temperature: float | None = None  # by this run, or by the loaded posterior's
        self.temperature: float | None = None  # what `predict` divides the logits by
        self.is_tuned = type(self).tunes_on_held_out(args)
        self.held_out_seen = args.testing_set == "train_val"  # by whoever chooses among runs
        self.begin_without_rows()
        # layers of the base model that its checkpoint has no weights for; None: that is not known
        self.new_layers: frozenset[str] | None = None
        # of `prepare_for_fit_evaluate`
        self.dataset = self.train_loader = self.eval_loader = self.held_out_loader = None
        self.calibration_loader = None
        self.shifted: dict[str, tuple[Any, Iterable[Batch]]] = {}  # name -> data set and loader
        # what training makes
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.schedulers: dict[str, torch.optim.lr_scheduler.LRScheduler] = {}
        self.num_training_steps = self.last_step = 0  # of the schedules, and of the loop
        self.predictions: Predictions | None = None  # of the last evaluation
        self.results: dict[str, dict[str, Any]] = {}  # data set -> its block of metrics.json
        # Around nn.Module's bookkeeping: the loop holds the wrapper, not the other way round.
        self.__dict__["loop"] = None
        self._resumed = False
        self.wandb_logger = None
        check_prefix(self)
        settle_generate(model, args.modelwrapper if self.final_draws() else None)
        self._trained_base_layers = train_head_under_lora(self, roots)

    # --- hooks ------------------------------------------------------------------------------------

    @classmethod
    def add_arguments(cls, parser) -> None:
        """Add the method's own flags to the parser."""

    @classmethod
    def check_arguments(cls, args) -> None:
        """Fill in the method's defaults and raise `UsageError` on flags that contradict it."""

    @classmethod
    def tunes_on_held_out(cls, args) -> bool:
        """Whether the run chooses anything by its held-out rows: a temperature, a prior."""
        return args.temperature_scaling

    @classmethod
    def check_call(cls, args) -> None:
        """`check_arguments`, and flags that every method has but not all can follow.

        Raises:
            UsageError: one of them is given to a method that cannot.
        """
        cls.check_arguments(args)
        check_method_flags(cls, args)

    @classmethod
    def adaptive_obstacle(cls, args) -> str | None:
        """See `ClassLogits`. What takes predictions must know that rows have unequal draws."""
        for name in ("predict", "evaluate"):
            if getattr(cls, name) is not getattr(WrapperBase, name):
                return f"its own {name} takes all draws for made"
        return super().adaptive_obstacle(args)

    @classmethod
    def recorded_flags(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Of the flags in a saved posterior's record those that it needs again."""
        return {key: flags[key] for key in cls.posterior_flags if key in flags}

    def sampling(self, n_samples: int) -> AbstractContextManager:
        """Context in which a batch stacked `n_samples` times sees that many draws of the weights.

        0 means the posterior mean. Contexts nest: an inner one of the same number is no change.
        """
        return nullcontext()

    def transformer_blocks(self) -> list[nn.Module]:
        """The base model's blocks, in their order; none where it has no list of them."""
        blocks = find_blocks(self.get_base_model())
        return list(blocks.modules) if blocks is not None else []

    def configure_optimizers(self) -> None:
        """Fill `optimizers` and `schedulers`; called once a loop, when every parameter exists."""
        args = self.args
        optimizer = build_optimizer(
            self.trainable_parameters(), args.opt, args.lr, args.opt_wd, args.adam_epsilon
        )
        self.optimizers = {"lora": optimizer}
        self.schedulers = {
            "lora": linear_schedule(optimizer, self.num_training_steps, args.warmup_ratio)
        }

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean over rows and draws of the NLL of the labels: a forward, and nothing else."""
        num_draws = self.args.bayes_train_n_samples if self.is_stochastic else 1
        with self.sampling(num_draws):
            logits = self.training_logits(batch, num_draws)  # (B, N, C)
        labels = batch["labels"].repeat_interleave(logits.shape[1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels)

    def training_step(self, batch: Batch) -> dict[str, float | Tensor]:
        """Forward and backward of one batch.

        Returns:
            what to log; "nll" is the loss that is watched for NaN.
        """
        num_draws = self.args.bayes_train_n_samples if self.is_stochastic else 1
        # Open around backward, too: gradient checkpointing runs the forward again in there.
        with self.sampling(num_draws):
            loss = self.loss(batch)
            self.backward(loss)
        accuracy = self.loop.accuracy(batch["labels"]) if self.loop is not None else {}
        return {"nll": loss.detach(), **accuracy}

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

    def final_draws(self) -> int:
        """N of the final evaluation; 0 is the posterior mean."""
        if not self.is_stochastic or self.args.bayes_inference_notsample:
            return 0
        return self.args.bayes_eval_n_samples_final

    def method_state(self) -> dict[str, Any]:
        """What else a resumed run needs: counters, and buffers that are not trained parameters."""
        return {}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `method_state`."""

    def method_config(self) -> dict[str, Any]:
        """The method's part of bayes_config.json: what makes the adapter Bayesian."""
        return {}

    def posterior_tensors(self) -> dict[str, Tensor]:
        """What the posterior has beside the adapter's parameters; saved in `posterior_file`."""
        return {}

    def load_posterior_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `posterior_tensors`: called when a saved posterior of it is loaded."""

    def take_posterior(self, folder: Path, record: PosteriorRecord | None) -> None:
        """Called once the weights of an adapter are loaded: make them this method's posterior.

        Args:
            folder: where the adapter lies.
            record: what its bayes_config.json says, if this method made it and nothing is trained
                on top; None for any other adapter.
        Raises:
            UsageError: the record or a file of the posterior is damaged.
        """
        if record is not None:
            posterior.give_back(self, record, folder / self.posterior_file)

    def check_own_data(self) -> None:
        """For `fit_posterior`: raise `UsageError` unless the adapter was trained on these data."""
        check_own_data(self.args)

    def described(self, record: PosteriorRecord, where: str) -> Record:
        """The method's own part of a record, checked; `where` begins the message if it is not."""
        return as_record(record.method, self.Description, where, "Fit the posterior again.")

    def completed_adapter(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter file's tensors, with what the method adds to those that it can do without."""
        return tensors

    # --- training ---------------------------------------------------------------------------------

    def training_logits(self, batch: Batch, n_samples: int = 1) -> Float[Tensor, "B N C"]:
        """`forward_logits` by way of the loop's view, which synchronises gradients."""
        inputs = self.model_inputs(batch)
        with self.accelerator.autocast():
            if self.loop is not None:
                return self.loop.view(inputs, n_samples)
            return prediction.with_draws(self.forward_logits(inputs, n_samples=n_samples))

    def backward(self, loss: Tensor) -> None:
        """Add this batch's share to the gradients of the current update."""
        weight = self.loop.loss_weight if self.loop is not None else 1.0
        self.accelerator.backward(loss * weight)

    # --- parameters -------------------------------------------------------------------------------

    def state_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of what a resumed run needs."""
        return self.trainable_parameters()

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is trained."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def settle(self) -> None:
        """Move to this process's device; with FSDP the frozen base in parts."""
        accelerator = self.accelerator
        if not shards_base(accelerator):
            self.to(accelerator.device)
            return
        whole = {parameter for _, parameter in self.state_parameters()}
        shard_base(self.get_base_model(), whole, accelerator.device, accelerator.num_processes)
        self.is_sharded = True

    # --- the verbs of a run -----------------------------------------------------------------------

    def prepare_for_fit_evaluate(self, dataset, wandb_logger=None) -> None:
        """Take loaders and answer tokens from a data set; build optimizers, schedules and the loop.

        Args:
            dataset: has `train_dataloader`, `test_dataloader`, `num_samples`, `num_labels`,
                `target_ids`.
            wandb_logger: a wandb run of your own to log to, if any.
        """
        args = self.args
        self.dataset = dataset
        self.wandb_logger = wandb_logger
        if self.is_causal:
            self.target_ids = dataset.target_ids.to(self.accelerator.device)
        if hasattr(dataset, "task"):
            posterior.check_classes(self, dataset.task)
            self.answers = list(dataset.task.choices)
            self.table_task = getattr(dataset.task, "table", None)
        if hasattr(dataset, "reader"):
            self.read_rows_by(dataset.reader)
        if (example := getattr(dataset, "shown_example", lambda: None)()) is not None:
            self.prompt = posterior.Prompt(**example)
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
        if args.calibrate != "no":
            self.calibration_loader = dataset.calibration_dataloader
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
            self.begin_loop()
        # What the generators give from here on is the method's noise: other on every process.
        torch.manual_seed(
            mix_seed("training noise", args.seed_sampling, self.accelerator.process_index)
        )

    def begin_loop(self, steps_before: int = 0) -> None:
        """New optimizers, and a new loop for what is trained now."""
        self.configure_optimizers()
        self.__dict__["loop"] = training.Loop(self, self.last_step, steps_before)

    @property
    def eval_n_samples(self) -> int:
        """`final_draws`, under the name that it had."""
        return self.final_draws()

    @eval_n_samples.setter
    def eval_n_samples(self, value: int) -> None:
        rule = "no attribute says how many draws are taken"
        raise UsageError(
            f"eval_n_samples = {value}: {rule}; pass n_samples, or override final_draws."
        )

    @property
    def step(self) -> int:
        """Updates done by the current loop."""
        return self.loop.step if self.loop is not None else 0

    @step.setter
    def step(self, value: int) -> None:
        self.loop.step = value

    @property
    def global_step(self) -> int:
        """Updates done in the whole run."""
        return self.loop.global_step if self.loop is not None else 0

    def fit(
        self, train_loader: Iterable[Batch], eval_loader: Iterable[Batch] | None = None
    ) -> None:
        """Train for `last_step` updates, from wherever the loop stands; see `Loop.run`.

        Raises:
            RunError: there is no loop yet, or the loss is not a number.
        """
        if self.loop is None:
            raise RunError(
                "fit: there is nothing to train; call prepare_for_fit_evaluate first, with a "
                "length (max_train_steps or n_epochs)."
            )
        self.resume_once()
        self.loop.run(train_loader, eval_loader)

    def resume_once(self) -> None:
        """With --resume put the run's last state back, the first time that training begins."""
        if self.args.resume and self.run_folder is not None and not self._resumed:
            self._resumed = True
            training.resume(self)

    def predict(self, eval_loader: Iterable[Batch], n_samples: int | None = None) -> Predictions:
        """Log-probabilities of every draw for every row; see `engine.prediction.predict`.

        Args:
            eval_loader: batches with labels and index; its `target_ids` are the answers, if it has
                any.
            n_samples: N; 0 for the posterior mean, None for the method's final number of draws, or
                with --draws-adaptive at most so many.
        """
        if n_samples is not None:
            return prediction.predict(self, eval_loader, n_samples)
        settling = Settling.of(self.args) if self.args.draws_adaptive else None
        return prediction.predict(self, eval_loader, self.final_draws(), settling)

    def evaluate(self, eval_loader: Iterable[Batch], n_samples: int | None = None) -> Metrics:
        """Metrics of the posterior predictive over all rows; keeps the draws in `predictions`."""
        draws = prediction.draws_for(self.predict, n_samples)
        self.predictions = self.predict(eval_loader, **draws)
        predictions = self.predictions
        log_probs = posterior_predictive(predictions.log_probs, predictions.num_draws)
        return score(log_probs, predictions.labels, self.args.num_bins)

    def fit_evaluate(self) -> Metrics:
        """Train if there is anything to train, evaluate, and leave the results in the folder."""
        if self.eval_loader is None:
            raise RunError("fit_evaluate needs data; call prepare_for_fit_evaluate first.")
        started = time.perf_counter()
        if self.num_training_steps:
            self.fit(self.train_loader, self.eval_loader if self.args.eval_per_steps else None)
        seconds = time.perf_counter() - started if self.num_training_steps else 0.0
        self.fit_posterior()
        return results.evaluate_run(self, seconds)

    # --- adapters on disk -------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As PEFT's, with the posterior's record, its tensors and a model card.

        A LoRA on the head does not drag the base model's whole head along; base weights of a
        classification head that were trained under its LoRA are added.
        """
        kwargs.setdefault("save_embedding_layers", False)
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            posterior.write_posterior(self, Path(save_directory))

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
        return posterior.push(self, repo_id, private, token, **kwargs)

    def save_adapter(self, folder: Path) -> list[str]:
        """Adapter and posterior, each file replaced in one step (on the main process).

        Returns:
            the names of the files, relative to `folder`.
        Raises:
            RunError: the disk is full or cannot be written.
        """
        self.accelerator.wait_for_everyone()
        return posterior.replace_files(self, folder) if self.accelerator.is_main_process else []

    def load_adapter_weights(self, folder: Path, adapter_name: str = "default") -> None:
        """Fill the adapter from a folder; see `engine.adapter_weights.load_weights`."""
        adapter_weights.load_weights(self, folder, adapter_name)
