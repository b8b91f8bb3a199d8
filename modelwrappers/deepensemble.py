r"""Deep ensemble (Lakshminarayanan et al., arXiv 1612.01474) of adapters on one frozen base.

M members, each with its own initialisation and its own order of the data, are trained one after
the other; their probabilities are averaged. Prediction is one mixed batch: the rows are stacked M
times and PEFT sends each copy through its member's adapter. (The published code trains the members
interleaved on the same batches and averages logits.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelwrappers.lora.heads import head_modules, head_roots, is_within
from modelwrappers.wrapperbase import Batch, WrapperBase
from utils.args import whole
from utils.errors import UsageError
from utils.hub import adapter_folder
from utils.logging import logger, notice_once
from utils.records import Count, Record, as_record
from utils.seeding import mix_seed


class DeepEnsemble(WrapperBase):
    """M independently trained adapters; member 0 is PEFT's "default"."""

    is_stochastic = True
    has_members = True
    posterior_flags = ("ensemble_average",)
    adapter_files = (
        *WrapperBase.adapter_files,
        *(f"member{{n}}/{name}" for name in WrapperBase.adapter_files[:2]),
    )

    def __init__(
        self, model, peft_config, args=None, accelerator=None, adapter_name="default", **settings
    ) -> None:
        heads = head_modules(model) if head_roots(model) else []
        unnamed = [name for name in heads if not _names(peft_config, name)]
        if heads:
            _give_heads_of_their_own(peft_config, model, heads)
        super().__init__(model, peft_config, args, accelerator, adapter_name, **settings)
        self.one_by_one = self.one_by_one or peft_config.use_dora  # PEFT mixes no batch of DoRA
        self._unnamed_head = [f"base_model.model.{name}" for name in unnamed]
        size = self.args.ensemble_n or _members_of(adapter_folder(self.args))
        if size > 1 and peft_config.bias != "none":
            raise UsageError(
                f"an ensemble of {size} members trains the base model's biases for one of them "
                f"only, but the adapter has bias={peft_config.bias!r}; train with bias='none', or "
                "pass --ensemble-n 1."
            )
        self.members = [adapter_name, *(f"member{i}" for i in range(1, size))]
        for name in self.members[1:]:
            self.add_adapter(name, peft_config)
            self._renew_head(name, heads)
        self.member = 0
        self.set_adapter(adapter_name)

    # --- hooks ------------------------------------------------------------------------------------

    @classmethod
    def add_arguments(cls, parser) -> None:
        group = parser.add_argument_group("deep ensemble")
        group.add_argument(
            "--ensemble-n",
            type=whole(1, 1_000),
            help="members (default: 3, or as loaded)",
        )

    @classmethod
    def check_arguments(cls, args) -> None:
        if args.ensemble_n is None and args.load_lora_path is None:
            args.ensemble_n = 3
        for name in ("bayes_inference_notsample", "bayes_eval_n_samples_final"):
            if name in args.given:
                flag = f"--{name.replace('_', '-')}"
                notice_once(f"{flag} has no effect: an ensemble predicts with its members.")

    def fit(self, train_loader: Iterable[Batch], eval_loader=None) -> None:
        """Train every member in turn; a resumed run goes on in the member it was in."""
        self.resume_once()
        for member in range(self.member, len(self.members)):
            if member > self.member:
                self._begin(member)
            logger.info("Member %d of %d", member + 1, len(self.members))
            sampler = getattr(train_loader, "batch_sampler", None)
            if member > 0 and hasattr(sampler, "seed"):
                sampler.seed = mix_seed("member's order", self.args.seed_data, member)
            super().fit(train_loader, eval_loader)

    def _begin(self, member: int) -> None:
        """Make `member` the one that is trained, with a loop, optimizers and noise of its own."""
        self.member = member
        self.set_adapter(self.members[member])
        self.begin_loop(steps_before=member * self.last_step)
        rank = self.accelerator.process_index
        torch.manual_seed(mix_seed("training noise", self.args.seed_sampling, rank, member))

    def state_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of all members: the finished ones are part of the state, too."""
        return [(n, p) for n, p in self.named_parameters() if _is_adapter(n, self.members)]

    def method_state(self) -> dict[str, Any]:
        return {"member": self.member}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        member = as_record(state, _Member, "method").member
        if member >= len(self.members):
            raise UsageError(f"member {member} of {len(self.members)}")
        self._begin(member)

    def method_config(self) -> dict[str, Any]:
        return {"members": self.members}

    def final_draws(self) -> int:
        """One draw per member."""
        return len(self.members) if hasattr(self, "members") else 1

    # --- logits -----------------------------------------------------------------------------------

    def forward_logits(
        self, batch: Batch, sample: bool = True, n_samples: int = 1, **kwargs
    ) -> Float[Tensor, "B N C"]:
        """(B, M, C): the logits of every member; in training (B, 1, C), those of the active one.

        `sample=False` gives the log of the members' mean probability, (B, 1, C): the mean of their
        weights would be no member's function.
        """
        if self.training:
            return self.batch_logits(batch).unsqueeze(1)
        logits = torch.cat(list(self.draw_logits(batch, n_samples))).transpose(0, 1)
        if self.args.ensemble_average == "logits":
            return logits.mean(1, keepdim=True)
        if sample:
            return logits
        return logits.float().softmax(-1).mean(1, keepdim=True).log()

    def _ready(self) -> list[str]:
        """The members that have been trained: while one is in training, those up to it."""
        is_training = self.step < self.last_step
        return self.members[: self.member + 1] if is_training else self.members

    def draw_logits(
        self, batch: Batch, n_samples: int, first: int | None = None
    ) -> Iterator[Float[Tensor, "m B C"]]:
        """The logits of all members that are ready, several of them in one mixed batch."""
        return self.copies_logits(batch, len(self._ready()))

    def copies_kwargs(self, draws: range, rows: int) -> dict[str, Any]:
        """Which member each row of a mixed batch is sent through."""
        if self.one_by_one:
            return {}
        return {"adapter_names": [name for name in self._names(draws) for _ in range(rows)]}

    def copies_forward(self, batch: Batch, draws: range, **kwargs) -> Float[Tensor, "mB C"]:
        """As the base's; where there is no mixed batch, the one member is the active one."""
        if not self.one_by_one:
            return super().copies_forward(batch, draws, **kwargs)
        active = self.active_adapter
        self.set_adapter(self._names(draws)[0])
        try:
            return super().copies_forward(batch, draws, **kwargs)
        finally:
            self.set_adapter(active)

    def _names(self, draws: range) -> list[str]:
        return self._ready()[draws.start : draws.stop]

    def noisy_modules(self) -> list[nn.Module]:
        """What a mixed batch goes through by member: LoRA layers and saved heads."""
        return [m for m in self.modules() if isinstance(m, LoraLayer | ModulesToSaveWrapper)]

    @property
    def rows_share_draws(self) -> bool:
        return True

    @classmethod
    def prefix_obstacle(cls, args) -> str | None:
        return None

    @classmethod
    def adaptive_obstacle(cls, args) -> str | None:
        return "an ensemble predicts with its members, and there are no more of them; drop it"

    # --- members ----------------------------------------------------------------------------------

    def _renew_head(self, member: str, heads: list[str]) -> None:
        """PEFT copies the head for each adapter; a new one must not begin alike in all members."""
        base = self.get_base_model()
        for name in heads:
            if name.startswith(f"{base.base_model_prefix}."):  # a pooler: its weights are loaded
                continue
            layer = base.get_submodule(name).modules_to_save[member]
            nn.init.normal_(layer.weight, std=getattr(base.config, "initializer_range", 0.02))

    def unnamed_head(self, adapter_name: str) -> list[str]:
        """Those that only members of an ensemble must have to themselves; they are trained on."""
        return self._unnamed_head

    def load_adapter_weights(self, folder: Path, adapter_name: str = "default") -> None:
        """Load member 0 from `folder` and the others from its subfolders.

        Raises:
            UsageError: the folder holds another number of members than --ensemble-n.
        """
        found = _members_of(folder)
        if found != len(self.members):
            raise UsageError(
                f"--load-lora-path: {folder} holds {found} member(s), but --ensemble-n is "
                f"{len(self.members)}; pass --ensemble-n {found}, or train the others."
            )
        super().load_adapter_weights(folder, self.members[0])
        for name in self.members[1:]:
            super().load_adapter_weights(folder / name, name)


class _Member(Record):
    """Which member is in training, in a state."""

    member: Count


def _members_of(folder: Path) -> int:
    return 1 + sum(1 for _ in folder.glob("member*/adapter_config.json"))


def _is_adapter(name: str, members: list[str]) -> bool:
    parts = name.split(".")
    return any(member in parts for member in members)


def _names(config: LoraConfig, layer: str) -> bool:
    """Whether a LoRA configuration trains a layer, whole or by LoRA, as PEFT reads its lists."""
    outer = [layer.rsplit(".", cut)[0] for cut in range(layer.count(".") + 1)]
    whole = any(name.endswith(saved) for saved in config.modules_to_save or () for name in outer)
    return whole or check_target_module_exists(config, layer) is True


def _give_heads_of_their_own(config: LoraConfig, model: PreTrainedModel, heads: list[str]) -> None:
    """Every member trains and saves the head's linear layers whole, also where LoRA was asked for.

    Base weights under LoRA are trained in place: one head for all members. And PEFT sends a mixed
    batch through plain linear layers, but not through a head of several.
    """
    roots = head_roots(model)
    others = [
        saved
        for saved in config.modules_to_save or ()
        if any(n.endswith(saved) and not is_within(n, roots) for n, _ in model.named_modules())
    ]
    config.modules_to_save = heads + others
    if not isinstance(config.target_modules, str):  # "all-linear" leaves out what is saved whole
        config.target_modules = set(config.target_modules) - set(heads)
    config.task_type = None  # else stock PEFT would wrap the whole head when it loads the adapter
