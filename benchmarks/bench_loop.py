"""What the training loop costs over a bare PEFT loop: python benchmarks/bench_loop.py [ROUNDS]

The same LoRA on the same SmolLM2-135M weights and batch: `WrapperBase.fit` with everything that it
does around a step (loss check, logging, history, schedules), against forward, backward and AdamW
written by hand. Both ask for one token's logits. Alternating in one process; ratio of medians.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from common import BATCH, TOKENS, alternate
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import main as program
from utils.embedded import resolve_model

BLOCK = 5  # updates per measured block


def main(rounds: int) -> None:
    folder = tempfile.mkdtemp()
    args = program.parse_args(
        "--dataset-type mcdataset --dataset bbc_headlines --model smollm2-135m --nowand "
        f"--modelwrapper mle --max-train-steps {10 * BLOCK * rounds} --batch-size {BATCH} "
        f"--output-dir {folder} --save-per-steps 0 --eval-per-steps 0".split()
    )
    wrapper = program.assemble(args)
    wrapper.run_folder.path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 40000, (BATCH, TOKENS), generator=generator),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        "labels": torch.randint(5, (BATCH,), generator=generator),
        "index": torch.arange(BATCH),
    }

    def loop_block() -> None:
        wrapper.loop.last_step = wrapper.step + BLOCK
        wrapper.fit([batch] * BLOCK)

    base = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m"))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    bare = get_peft_model(base, config).train()
    parameters = [p for p in bare.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, weight_decay=0.0)

    def bare_block() -> None:
        for _ in range(BLOCK):
            output = bare(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                logits_to_keep=1,
                use_cache=False,
            )
            logits = output.logits[:, -1, wrapper.target_ids]
            torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()

    seconds = alternate({"bare": bare_block, "loop": loop_block}, rounds)
    print(
        f"batch {BATCH} x {TOKENS}, {rounds} x {BLOCK} updates, {torch.get_num_threads()} threads"
    )
    print(f"bare PEFT loop   {seconds['bare'] / BLOCK:.3f} s/update")
    print(f"WrapperBase.fit  {seconds['loop'] / BLOCK:.3f} s/update")
    print(f"ratio            {seconds['loop'] / seconds['bare']:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
