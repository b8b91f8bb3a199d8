"""What BLoB costs: python benchmarks/bench_blob.py [ROUNDS]

SmolLM2-135M, float32, batch 4 x 68 tokens, r 8 on q_proj, v_proj and lm_head. Everything alternates
in one process; ratios of medians.

- BLoB's training step against plain LoRA's, both by `Loop.update`, with one token's logits;
- ten draws in one stacked forward against one deterministic pass;
- both against a faithful loop: the published procedure written down plainly, with logits of the
  whole vocabulary at every position, one forward per draw, float signs, a float64 KL by a Python
  loop over the layers through autograd.

Peak memory is measured in a process of its own for each side, as growth of the resident set.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile

import torch
from common import BATCH, TOKENS, alternate, growth_of_memory
from torch import nn

import main as program

DRAWS = 10
LR, KLLR, PRIOR_STD, EPS = 1e-4, 0.01, 0.2, 0.05


def build(method: str):
    flags = "--dataset-type mcdataset --dataset bbc_headlines --model smollm2-135m --nowand "
    flags += f"--modelwrapper {method} --max-train-steps 100000 --batch-size {BATCH} --lr {LR} "
    flags += f"--apply-classhead-lora --save-per-steps 0 --output-dir {tempfile.mkdtemp()} "
    flags += f"--eval-batch-size {BATCH * DRAWS} "
    if method == "blob":
        flags += f"--bayes-kllr {KLLR} --bayes-klreweighting"
    return program.assemble(program.parse_args(flags.split()))


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 40000, (BATCH, TOKENS), generator=generator),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        "labels": torch.randint(5, (BATCH,), generator=generator),
        "index": torch.arange(BATCH),
    }


# --- the faithful loop ----------------------------------------------------------------------------


class FaithfulLayer(nn.Module):
    """A LoRA layer of the published procedure, one draw per forward, signs as float tensors."""

    def __init__(self, base: nn.Linear, r: int = 8, alpha: int = 16) -> None:
        super().__init__()
        self.base, self.scaling = base, alpha / r
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r))
        self.rho = nn.Parameter(torch.empty_like(self.lora_a).uniform_(EPS / math.sqrt(2), EPS))

    def forward(self, x):
        mean = (x @ self.lora_a.T) @ self.lora_b.T
        signs_in = torch.empty_like(x).uniform_(-1, 1).sign()
        signs_out = x.new_empty(*x.shape[:-1], len(self.lora_a)).uniform_(-1, 1).sign()
        noise = self.rho**2 * torch.randn_like(self.lora_a)
        noisy = (((x * signs_in) @ noise.T) * signs_out) @ self.lora_b.T
        return self.base(x) + (mean + noisy) * self.scaling

    def kl(self):
        std = (self.rho**2).double()
        mean = self.lora_a.double()
        terms = math.log(PRIOR_STD) - std.log() + (std**2 + mean**2) / (2 * PRIOR_STD**2) - 0.5
        return terms.sum()


class Faithful:
    """Model and training step of the published procedure, written down plainly."""

    def __init__(self, model: nn.Module, target_ids: torch.Tensor) -> None:
        self.model, self.target_ids = model.train(), target_ids
        self.layers = []
        for name, module in list(model.named_modules()):
            if name.endswith(("q_proj", "v_proj", "lm_head")):
                parent, _, child = name.rpartition(".")
                layer = FaithfulLayer(module)
                setattr(model.get_submodule(parent) if parent else model, child, layer)
                self.layers.append(layer)
        means = [layer.lora_a for layer in self.layers]
        on_b = [layer.lora_b for layer in self.layers]
        self.adamw = torch.optim.AdamW([*means, *on_b], lr=LR, eps=1e-6, weight_decay=0.0)
        self.sgd = torch.optim.SGD([*means, *on_b, *(x.rho for x in self.layers)], lr=KLLR)

    def logits(self, batch):
        output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output.logits[:, -1, self.target_ids]

    def step(self, batch) -> None:
        nn.functional.cross_entropy(self.logits(batch), batch["labels"]).backward()
        self.adamw.step()
        self.adamw.zero_grad()
        kl = 0
        for layer in self.layers:
            kl = kl + layer.kl()
        (0.01 * kl).backward()
        self.sgd.step()
        self.sgd.zero_grad()

    @torch.inference_mode()
    def draws(self, batch) -> torch.Tensor:
        return torch.stack([self.logits(batch) for _ in range(DRAWS)], dim=1)


def faithful_loop(target_ids: torch.Tensor) -> Faithful:
    from transformers import AutoModelForCausalLM

    from utils.embedded import resolve_model

    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m"))
    model.requires_grad_(False)
    model.config.use_cache = False
    return Faithful(model, target_ids)


# --- measurements ---------------------------------------------------------------------------------


def memory_of(side: str) -> int:
    """Bytes by which three training steps and ten draws raise a fresh process's peak."""
    command = [sys.executable, __file__, "--memory", side]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.strip().splitlines()[-1])


def measure_memory(side: str) -> None:
    batch = make_batch()
    wrapper = build("blob")
    if side == "faithful":
        loop = faithful_loop(wrapper.target_ids)
        step, draws = loop.step, loop.draws
    else:
        faithful_loop(wrapper.target_ids)  # loaded on both sides, so that the start is the same

        def step(b):
            wrapper.loop.update([b])

        def draws(b):
            with torch.inference_mode():
                wrapper.eval().forward_logits(wrapper.model_inputs(b), n_samples=DRAWS)
                wrapper.train()

    def work() -> None:
        for _ in range(3):
            step(batch)
        draws(batch)

    print(growth_of_memory(work))


def main(rounds: int) -> None:
    batch = make_batch()
    plain, blob = build("mle"), build("blob")
    loop = faithful_loop(blob.target_ids)

    def update(wrapper):
        wrapper.train()
        wrapper.loop.update([batch])

    def predict(wrapper, draws: int):
        wrapper.eval()
        with torch.inference_mode():
            inputs = wrapper.model_inputs(batch)
            return wrapper.forward_logits(inputs, sample=draws > 0, n_samples=max(1, draws))

    steps = {
        "plain LoRA step": lambda: update(plain),
        "BLoB step": lambda: update(blob),
        "faithful step": lambda: loop.step(batch),
        "one pass (mean)": lambda: predict(blob, 0),
        "ten draws": lambda: predict(blob, DRAWS),
        "faithful ten draws": lambda: loop.draws(batch),
    }
    ours, theirs = memory_of("ours"), memory_of("faithful")
    print(f"batch {BATCH} x {TOKENS}, {rounds} rounds, {torch.get_num_threads()} threads\n")
    print("| measured | seconds (median) | ratio | goal |\n|---|---|---|---|")
    for above, below, goal in (
        ("BLoB step", "plain LoRA step", "at most 1.08"),
        ("ten draws", "one pass (mean)", "at most 9.0"),
        ("faithful step", "BLoB step", "at least 1.5"),
        ("faithful ten draws", "ten draws", "at least 2"),
    ):
        # Two at a time: a third that frees much memory would cost its neighbours page faults.
        seconds = alternate({above: steps[above], below: steps[below]}, rounds)
        numbers = f"{seconds[above]:.3f} / {seconds[below]:.3f}"
        print(f"| {above} / {below} | {numbers} | {seconds[above] / seconds[below]:.3f} | {goal} |")
    sizes = f"{ours / 2**20:.0f} / {theirs / 2**20:.0f} MiB"
    print(f"| peak memory ours / faithful | {sizes} | {ours / theirs:.3f} | at most 1 |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
