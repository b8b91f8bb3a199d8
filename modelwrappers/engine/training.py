"""The one training loop: updates, accumulation, the DDP view, the guard against NaN, resume.

It knows a wrapper by its hooks only: `training_step`, `optimizer_step`, `evaluate`,
`state_parameters`, `method_state` and `load_method_state`. The way of a tensor:

    loader -> batch -> training_step -> loss -> training_logits -> view -> forward_logits (B, N, C)
           -> mean NLL -> backward -> optimizer_step
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from modelwrappers.engine.prediction import Batch, draws_for, with_draws
from modelwrappers.engine.tracking import track
from utils.errors import RunError, UsageError, quoted
from utils.interrupts import Interrupted, interrupts
from utils.logging import logger
from utils.run_folder import RunFolder
from utils.run_state import StateRecord, check_alike, check_optimizer, check_parameters

if TYPE_CHECKING:
    from modelwrappers.wrapperbase import WrapperBase


class _TrainingView(nn.Module):
    """What DDP wraps: a view beside the wrapper whose forward is one training forward.

    The wrapper stays what it is: no `.module` in its way, no prefix in its state dict.

    Attributes:
        logits: what the last forward gave, (B, N, C), without gradients.
    """

    def __init__(self, wrapper: WrapperBase) -> None:
        super().__init__()
        self.wrapper = wrapper
        self.logits: Tensor | None = None

    def forward(self, batch: Batch, n_samples: int) -> Tensor:
        logits = with_draws(self.wrapper.forward_logits(batch, sample=True, n_samples=n_samples))
        self.logits = logits.detach()
        return logits


class Loop:
    """Trains one wrapper, or one member of it, for `last_step` updates.

    Args:
        wrapper: with its optimizers and schedules.
        last_step: updates to make.
        steps_before: updates of the loops before this one, in a run of several.
    Attributes:
        step: updates done.
        epoch: that the current update's rows are of.
        position: epoch, and batches of it that were consumed.
        loss_weight: share of the current batch in its update.
        view: what a training forward goes through: DDP, where there are several processes.
    """

    def __init__(self, wrapper: WrapperBase, last_step: int, steps_before: int = 0) -> None:
        self.wrapper = wrapper
        self.accelerator = wrapper.accelerator
        self.last_step = last_step
        self.steps_before = steps_before
        self.step = 0
        self.epoch = 0
        self.position = (0, 0)
        self.loss_weight = 1.0
        self._forward = _TrainingView(wrapper)
        self.view = self._synchronised(self._forward)
        self._saved_at = 0  # the update of the whole run whose state is on disk
        self._evaluation_due = False  # by a resumed run, before the next update
        self._is_told_to_stop = False  # whether any process has been told to

    @property
    def global_step(self) -> int:
        """Updates done in the whole run."""
        return self.steps_before + self.step

    @property
    def folder(self) -> RunFolder | None:
        """Where history and states go, if anywhere."""
        return self.wrapper.run_folder

    def _synchronised(self, view: nn.Module) -> nn.Module:
        """With several processes DDP, over what trains now and is not sharded."""
        if self.accelerator.num_processes == 1:
            return view
        sharded = [name for name, p in view.named_parameters() if isinstance(p, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(view, sharded)
        device = self.accelerator.device
        return DistributedDataParallel(view, [device] if device.type == "cuda" else None)

    # --- updates ----------------------------------------------------------------------------------

    def run(
        self, train_loader: Iterable[Batch], eval_loader: Iterable[Batch] | None = None
    ) -> None:
        """Train up to `last_step`, from wherever the loop stands.

        Args:
            train_loader: batches of the data set contract; iterated once per epoch.
            eval_loader: evaluated every --eval-per-steps updates, if given.
        Raises:
            RunError: the loss is not a number.
            Interrupted: by SIGINT or SIGTERM, with a state to go on from.
        """
        wrapper, args = self.wrapper, self.wrapper.args
        wrapper.train()
        progress = tqdm(
            total=self.last_step,
            initial=self.step,
            desc="train",
            disable=not self.accelerator.is_local_main_process,
            mininterval=1.0,
        )
        shown: dict[str, str] = {}
        # A signal lets the update end; the state is saved, and then the run ends.
        with progress, interrupts.deferred():
            if self._evaluation_due and eval_loader is not None:
                self._evaluate(eval_loader)
            for batches in self._updates(train_loader):
                started = time.perf_counter()
                rates = {key: s.get_last_lr()[0] for key, s in wrapper.schedulers.items()}
                log = self.update(batches)
                self.step += 1
                record = {"step": self.global_step, "epoch": self.epoch, **log, "lr": rates}
                record["seconds"] = round(time.perf_counter() - started, 4)
                self._append_history(record)
                track(
                    wrapper, {f"train/{key}": value for key, value in log.items()} | {"lr": rates}
                )
                shown["nll"] = f"{log['nll']:.3f}"
                progress.set_postfix(shown, refresh=False)
                progress.update()
                if self.step == self.last_step:
                    break
                is_evaluated = _is_due(self.step, args.eval_per_steps)
                self._evaluation_due = eval_loader is not None and is_evaluated
                self._stop_if_told()
                if self._evaluation_due:
                    metrics = self._evaluate(eval_loader)
                    shown |= {key: f"{value:.3f}" for key, value in metrics.items()}
                if _is_due(self.step, args.save_per_steps):
                    self.save_state()
                self._stop_if_told()
            # A run that is killed or interrupted while it evaluates need not train again.
            if args.save_per_steps or (self.folder is not None and self.folder.is_open):
                self.save_state()
            self._stop_if_told()
        interrupts.raise_if_any()
        for parameter in wrapper.parameters():
            parameter.grad = None

    def _updates(self, loader: Iterable[Batch]) -> Iterator[list[Batch]]:
        """The batches of each update, epoch after epoch, from the current position."""
        while self.step < self.last_step:
            self.epoch, consumed = self.position
            sampler = getattr(loader, "batch_sampler", None)
            if hasattr(sampler, "set_position"):
                sampler.set_position(self.epoch, consumed)
            batches: list[Batch] = []
            for batch in loader:
                batches.append(batch)
                consumed += 1
                if len(batches) == self.wrapper.args.grad_accum_steps:
                    self.position = (self.epoch, consumed)
                    yield batches
                    batches = []
                    if self.step >= self.last_step:
                        return
            self.position = (self.epoch + 1, 0)
            if batches:  # the epoch's rest is an update of its own
                yield batches
            elif consumed == 0:
                raise RunError("the training loader gave no batch.")

    def update(self, batches: list[Batch]) -> dict[str, float]:
        """Forward and backward of each batch, one optimizer step; the means to log.

        Raises:
            RunError: the loss, or what the optimizers report, is not finite.
        """
        wrapper = self.wrapper
        num_rows = sum(len(batch["labels"]) for batch in batches)
        totals: dict[str, float | Tensor] = {}
        for position, batch in enumerate(batches):
            batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
            self.loss_weight = len(batch["labels"]) / num_rows
            is_last = position == len(batches) - 1
            no_sync = getattr(self.view, "no_sync", nullcontext)
            self._forward.logits = None
            with nullcontext() if is_last else no_sync():
                values = wrapper.training_step(batch)
            for key, value in values.items():
                totals[key] = totals.get(key, 0.0) + self.loss_weight * value
        told = {"told to stop": float(interrupts.number is not None)}
        totals = self._to_floats(totals | told)
        self._is_told_to_stop = totals.pop("told to stop") > 0
        rates = ", ".join(wrapper.learning_rate_flags)
        if not all(map(math.isfinite, totals.values())):
            rows = [int(i) for batch in batches for i in batch["index"]]
            raise RunError(
                f"the training loss is {totals.get('nll')} at update {self.step + 1}, on the rows "
                f"{rows} of the training set, with the parameters that the update before left. "
                f"Look at those rows, or lower the learning rates ({rates})."
            )
        done = self._to_floats(wrapper.optimizer_step())
        if not all(map(math.isfinite, done.values())):
            raise RunError(
                f"update {self.step + 1} gave {done}: the optimizers have diverged. Lower the "
                f"learning rates ({rates}); --resume goes on from the last state."
            )
        return totals | done

    def accuracy(self, labels: Tensor) -> dict[str, Tensor]:
        """What to log of the last training forward, if it was one of the rows of these labels."""
        logits = self._forward.logits
        if logits is None or len(logits) != len(labels):
            return {}
        predicted = logits.float().softmax(-1).mean(1).argmax(-1)
        return {"acc": (predicted == labels).float().mean()}

    def _to_floats(self, values: dict[str, float | Tensor]) -> dict[str, float]:
        """Means over the processes, in one transfer."""
        if not values:
            return {}
        device = self.accelerator.device
        stacked = torch.stack([torch.as_tensor(v, device=device).float() for v in values.values()])
        if self.accelerator.num_processes > 1:
            stacked = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(values, stacked.tolist(), strict=True))

    # --- while training ---------------------------------------------------------------------------

    def _evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        args, wrapper = self.wrapper.args, self.wrapper
        limited = _spread(loader, args.eval_steps) if args.eval_steps else loader
        alone = self.accelerator.num_processes == 1  # others would wait for this process
        number = args.bayes_eval_n_samples if wrapper.final_draws() else 0
        try:
            with interrupts.deferred(wait=not alone):
                metrics = wrapper.evaluate(limited, **draws_for(wrapper.evaluate, number))._asdict()
        except Interrupted:
            self.save_state()  # the evaluation is due, and will be made by the resumed run
            raise
        self._evaluation_due = False
        self._append_history({"step": self.global_step, "eval": metrics})
        track(wrapper, {f"eval/{key}": value for key, value in metrics.items()})
        return metrics

    def _append_history(self, record: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.append_history(record)

    def _stop_if_told(self) -> None:
        """End the run by SIGINT or SIGTERM, with a state to go on from.

        All processes do so after the same update: of several, `_to_floats` has told them.
        """
        told = interrupts.number is not None
        if self.accelerator.num_processes > 1:
            told = self._is_told_to_stop
        if told:
            self.save_state()
            raise Interrupted(interrupts.number or signal.SIGTERM)

    # --- state ------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """Keep all that `resume` needs, unless the state of this update is kept already."""
        if self.folder is None or self._saved_at == self.global_step:
            return
        wrapper = self.wrapper
        state = {
            "step": self.step,
            "position": list(self.position),
            "parameters": {name: p.detach() for name, p in wrapper.state_parameters()},
            "optimizers": {key: o.state_dict() for key, o in wrapper.optimizers.items()},
            "schedulers": {key: s.state_dict() for key, s in wrapper.schedulers.items()},
            "method": wrapper.method_state(),
            "evaluation_due": self._evaluation_due,
        }
        self.folder.save_state(self.global_step, state, self.accelerator.wait_for_everyone)
        self._saved_at = self.global_step

    def take(self, state: StateRecord, global_step: int) -> None:
        """Put a state in place.

        Raises:
            UsageError: it does not fit this run. What was put in place by then is replaced by the
                next one that is tried.
        """
        wrapper = self.wrapper
        self.step, self.position = state.step, tuple(state.position)
        if self.step > self.last_step or self.global_step != global_step:
            raise UsageError(f"its step is {state.step}, of {self.last_step} updates")
        self._check_position()
        parameters = dict(wrapper.state_parameters())
        check_parameters(state.parameters, parameters)
        for kind, stored, ours in (
            ("optimizers", state.optimizers, wrapper.optimizers),
            ("schedulers", state.schedulers, wrapper.schedulers),
        ):
            if stored.keys() != ours.keys():
                raise UsageError(f"it has the {kind} {quoted(sorted(stored))}")
        for key, optimizer in wrapper.optimizers.items():
            check_optimizer(state.optimizers[key], optimizer)
        for key, scheduler in wrapper.schedulers.items():
            if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                check_alike(state.schedulers[key], scheduler.state_dict(), "schedulers")
        with torch.no_grad():
            for name, value in state.parameters.items():
                parameters[name].copy_(value)
        try:
            for key, optimizer in wrapper.optimizers.items():
                optimizer.load_state_dict(state.optimizers[key])
            for key, scheduler in wrapper.schedulers.items():
                scheduler.load_state_dict(state.schedulers[key])
        except Exception as error:  # of a method's own optimizers
            raise UsageError(f"the optimizers cannot take their part ({_told(error)})") from None
        self._evaluation_due = state.evaluation_due
        self._saved_at = global_step

    def _check_position(self) -> None:
        """So many batches of so many epochs are no more than the updates that were made.

        Raises:
            UsageError: they are.
        """
        epoch, consumed = self.position
        batches, size = len(self.wrapper.train_loader), self.wrapper.args.grad_accum_steps
        done = epoch * -(-batches // size) + -(-consumed // size)
        if consumed > batches or done > self.step:
            raise UsageError(f"its position {epoch}, {consumed} is not that of update {self.step}")


def resume(wrapper: WrapperBase) -> None:
    """Put the last state of the run's folder back, if there is one.

    The method takes its part first: it may decide what is trained, and by which loop.

    Raises:
        UsageError: there are states, but none that can be used.
    """

    def take(state: StateRecord, global_step: int) -> None:
        try:
            wrapper.load_method_state(state.method)
        except Exception as error:  # a method's own, and what was stored may be anything
            raise UsageError(f"the method cannot take its part ({_told(error)})") from None
        wrapper.loop.take(state, global_step)

    def all_agree(yes: bool) -> bool:
        if wrapper.accelerator.num_processes == 1:
            return yes
        vote = torch.tensor(float(yes), device=wrapper.accelerator.device)
        return wrapper.accelerator.reduce(vote, reduction="mean").item() == 1

    folder = wrapper.run_folder
    own = sum(p.numel() * p.element_size() for _, p in wrapper.state_parameters())
    loaded = folder.load_state(take, all_agree, 64 * own + 2**30)
    if loaded is None:
        logger.info("--resume: there is no state in %s; starting.", folder.path)
        return
    state, restore_generators = loaded
    folder.cut_history(wrapper.loop.global_step, state.evaluation_due)
    logger.info("Resuming after update %d.", wrapper.loop.global_step)
    restore_generators()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _spread(loader: Iterable[Batch], number: int) -> Iterator[Batch]:
    """`number` batches from all over: the first ones would be the longest rows."""
    chosen = {round(i * len(loader) / number) for i in range(number)}
    return (batch for position, batch in enumerate(loader) if position in chosen)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
