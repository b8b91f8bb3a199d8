"""What posterior draws cost, and what they are worth: python benchmarks/bench_draws.py [ROUNDS]

Everything is a ratio to one deterministic pass (the posterior mean, whole prompts, no cache) of the
same rows; both sides alternate in one process, ratios of medians. SmolLM2-135M and MiniLM-L6,
float32, r 8 on query and value.

    cost      ten draws with noise in all blocks, in the last 15, 8 and 4; a cached beginning; four
              antithetic draws, which are worth ten independent ones on the adapter of `error`
    growth    with the number of draws, of rows and of tokens
    error     of n independent and n antithetic draws against 1,000 others, on a BLoB adapter that
              is trained first, and how many antithetic draws are worth ten independent ones
    memory    peak of ten draws, as growth of a fresh process's resident set
    settling  no time: simulated rows, how often --draws-adaptive stops one too early

    python benchmarks/bench_draws.py 3 cost growth      # some of them; all take about 20 minutes
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

import torch
from common import BATCH, TOKENS, alternate, growth_of_memory

import main as program
from modelwrappers.engine.adaptive import Settling, settled_draws
from modelwrappers.engine.prefix import sharing_prefix
from utils.metrics import posterior_predictive

DRAWS = 10
SMOLLM2 = "--dataset-type mcdataset --model smollm2-135m"
MINILM = "--dataset-type bertds --model minilm-l6"


def build(flags: str):
    flags = f"--dataset bbc_headlines --modelwrapper blob --nowand --save-per-steps 0 {flags}"
    flags += f" --output-dir {tempfile.mkdtemp()} --eval-batch-size 4000"
    return program.assemble(program.parse_args(flags.split())).eval()


def batch_of(wrapper, rows: int, tokens: int, shared: int = 0) -> dict[str, torch.Tensor]:
    """Random rows of one length; the first `shared` tokens are the same in all of them."""
    generator = torch.Generator().manual_seed(0)
    most = min(20000, wrapper.base_model.config.vocab_size)
    ids = torch.randint(1000, most, (rows, tokens), generator=generator)
    ids[:, :shared] = ids[0, :shared]
    ids[:, shared] = 1000 + torch.arange(rows)  # and no more
    return wrapper.model_inputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def predict(wrapper, batch, draws: int, with_prefix: bool = False):
    """The logits of so many draws, 0 for the mean; the beginning is computed, too."""
    wrapper.args.__dict__["prefix_cache"] = "auto" if with_prefix else "off"
    with torch.inference_mode(), wrapper.evaluation_draws(draws), sharing_prefix(wrapper, draws):
        return wrapper.forward_logits(batch, sample=draws > 0, n_samples=max(1, draws))


def ratio(way, one_pass, rounds: int) -> tuple[float, float, float]:
    """(seconds, seconds of one pass, passes)"""
    seconds = alternate({"way": way, "pass": one_pass}, rounds)
    return seconds["way"], seconds["pass"], seconds["way"] / seconds["pass"]


def row(name: str, measured: tuple[float, float, float]) -> None:
    print("| {} | {:.3f} / {:.3f} | {:.2f} |".format(name, *measured), flush=True)


# --- cost -----------------------------------------------------------------------------------------


def cost(rounds: int) -> None:
    from bench_blob import faithful_loop

    print(f"\n### Draws in passes; {BATCH} rows, where nothing else is said\n")
    print("| way | seconds, of one pass | passes |\n|---|---|---|")
    for name, base, blocks in (
        ("SmolLM2", SMOLLM2, ("all", "last:15", "last:8", "last:4")),
        ("MiniLM", MINILM, ("all", "last:3", "last:1")),
    ):
        for layers in blocks:
            wrapper = build(f"{base} --lora-layers {layers}")
            batch = batch_of(wrapper, BATCH, TOKENS)
            measured = ratio(
                lambda w=wrapper, b=batch: predict(w, b, DRAWS),
                lambda w=wrapper, b=batch: predict(w, b, 0),
                rounds,
            )
            row(f"{name}, {TOKENS} tokens, noise in {layers}", measured)
    for tokens, shared in ((68, 40), (300, 256)):
        for layers in ("all", "last:15", "last:8"):
            wrapper = build(f"{SMOLLM2} --lora-layers {layers} --flipout none")
            batch = batch_of(wrapper, 16, tokens, shared)
            measured = ratio(
                lambda w=wrapper, b=batch: predict(w, b, DRAWS, with_prefix=True),
                lambda w=wrapper, b=batch: predict(w, b, 0),
                rounds,
            )
            row(
                f"SmolLM2, 16 rows, {shared} of {tokens} tokens shared, noise in {layers}", measured
            )
    for flags, shared in (("--draws antithetic", 0), ("--draws antithetic --flipout none", 40)):
        wrapper = build(f"{SMOLLM2} --lora-layers last:15 {flags}")
        batch = batch_of(wrapper, 16, TOKENS, shared)
        measured = ratio(
            lambda w=wrapper, b=batch, p=shared > 0: predict(w, b, 4, with_prefix=p),
            lambda w=wrapper, b=batch: predict(w, b, 0),
            rounds,
        )
        name = f"SmolLM2, 16 rows, {shared} of 68 tokens shared, four antithetic draws, last:15"
        row(name, measured)
    wrapper = build(SMOLLM2)
    loop = faithful_loop(wrapper.target_ids)
    batch = batch_of(wrapper, BATCH, TOKENS)
    measured = ratio(lambda: loop.draws(batch), lambda: predict(wrapper, batch, 0), rounds)
    row(f"SmolLM2, {TOKENS} tokens, the published procedure", measured)


# --- growth ---------------------------------------------------------------------------------------


def growth(rounds: int) -> None:
    print("\n### How it grows: passes of the same rows, SmolLM2\n")
    print("| draws x rows x tokens | all blocks | last:15 | last:8 |\n|---|---|---|---|")
    wrappers = [build(f"{SMOLLM2} --lora-layers {k}") for k in ("all", "last:15", "last:8")]
    shapes = [(n, BATCH, TOKENS) for n in (1, 2, 5, 10, 20, 100)]
    shapes += [(DRAWS, rows, TOKENS) for rows in (1, 16)]
    shapes += [(DRAWS, BATCH, tokens) for tokens in (17, 272)]
    for draws, rows, tokens in shapes:
        cells = []
        for wrapper in wrappers:
            batch = batch_of(wrapper, rows, tokens)
            measured = ratio(
                lambda w=wrapper, b=batch, n=draws: predict(w, b, n),
                lambda w=wrapper, b=batch: predict(w, b, 0),
                max(1, rounds * DRAWS // max(draws, DRAWS)),
            )
            cells.append(f"{measured[2]:.2f}")
        print(f"| {draws} x {rows} x {tokens} | {' | '.join(cells)} |", flush=True)


# --- error ----------------------------------------------------------------------------------------

REFERENCE, SETS = 1000, 600  # draws of the reference, and those that are split into sets of n


def error(rounds: int) -> None:
    """Root mean square error of the predictive probability of n draws."""
    print(f"\n### Error of n draws against {REFERENCE} others, MiniLM, 40 headlines\n")
    training = "--limit-train 200 --limit-eval 40 --max-train-steps 160 --batch-size 8 --lr 1e-3 "
    training += "--bayes-klreweighting --bayes-kllr 0.01 --eval-per-steps 0"
    wrapper = build(f"{MINILM} {training}")
    wrapper.run_folder = None  # nothing is kept
    wrapper.fit(wrapper.dataset.train_dataloader)
    loader = wrapper.dataset.test_dataloader

    def probabilities(draws: int, antithetic: bool, seed: int) -> torch.Tensor:
        wrapper.args.__dict__["seed_sampling"] = seed
        wrapper.args.__dict__["draws"] = "antithetic" if antithetic else "independent"
        wrapper.draws.antithetic = antithetic
        return wrapper.predict(loader, n_samples=draws).log_probs.double().exp()

    reference = probabilities(REFERENCE, False, 1).mean(1)
    kinds = {
        "independent": probabilities(SETS, False, 2),
        "antithetic": probabilities(SETS, True, 3),
    }
    errors = {kind: {} for kind in kinds}
    print("| draws | independent | antithetic | variance ratio |\n|---|---|---|---|")
    for n in range(2, 21, 2):
        for kind, draws in kinds.items():
            sets = draws[:, : SETS // n * n].unflatten(1, (-1, n)).mean(2)  # (rows, sets, C)
            errors[kind][n] = (sets - reference[:, None]).square().mean().sqrt().item()
        ours, theirs = errors["antithetic"][n], errors["independent"][n]
        print(f"| {n} | {theirs:.4f} | {ours:.4f} | {(theirs / ours) ** 2:.2f} |", flush=True)
    equal = next(n for n, e in errors["antithetic"].items() if e <= errors["independent"][DRAWS])
    print(f"\n{equal} antithetic draws have at most the error of {DRAWS} independent ones.")


# --- memory ---------------------------------------------------------------------------------------

WAYS = {
    "one pass": (f"{SMOLLM2}", 0, False),
    "ten draws, noise in all blocks": (SMOLLM2, DRAWS, False),
    "ten draws, last:15": (f"{SMOLLM2} --lora-layers last:15", DRAWS, False),
    "ten draws, last:8": (f"{SMOLLM2} --lora-layers last:8", DRAWS, False),
    "ten draws, all blocks, no signs": (f"{SMOLLM2} --flipout none", DRAWS, False),
    "ten draws, all blocks, 40 of 68 tokens cached": (f"{SMOLLM2} --flipout none", DRAWS, True),
}


def memory(rounds: int) -> None:
    print(f"\n### Peak memory of {BATCH} x {TOKENS} tokens, growth of the resident set\n")
    print("| way | MiB |\n|---|---|")
    for name in WAYS:
        command = [sys.executable, __file__, "--memory", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(f"| {name} | {int(output.split()[-1]) / 2**20:.0f} |", flush=True)


def measure_memory(name: str) -> None:
    flags, draws, with_prefix = WAYS[name]
    wrapper = build(flags)
    batch = batch_of(wrapper, BATCH, TOKENS, 40)
    print(growth_of_memory(lambda: predict(wrapper, batch, draws, with_prefix)))


# --- settling -------------------------------------------------------------------------------------


def settling(rounds: int) -> None:
    """Rows of which all draws are known: would those that were made have said the same?"""
    print("\n### Rows that --draws-adaptive stops (error rate 0.01, tolerance 0.05), 20,000 each\n")
    print("| draws of a row | N | mean made | another answer | probability off by more |")
    print("|---|---|---|---|---|")
    for name, simulate in SIMULATED.items():
        for most in (10, 32, 100):
            logits = simulate(most, torch.Generator().manual_seed(most))
            batch = {"input_ids": torch.arange(len(logits))[:, None]}

            def draw(some, number, first, logits=logits):
                yield logits[some["input_ids"][:, 0], first : first + number].transpose(0, 1)

            log_probs, made = settled_draws(draw, batch, most, Settling())
            found = posterior_predictive(log_probs, made)
            whole = posterior_predictive(logits.log_softmax(-1))
            answer = found.argmax(-1, keepdim=True)
            other = (answer[:, 0] != whole.argmax(-1)).double().mean()
            distance = (found.exp() - whole.exp()).abs().gather(1, answer)
            off = (distance > Settling().tolerance).double().mean()
            mean = made.double().mean()
            print(f"| {name} | {most} | {mean:.1f} | {other:.4f} | {off:.4f} |", flush=True)


ROWS, CLASSES = 20_000, 5


def _unequal_rows(most: int, generator) -> torch.Tensor:
    """Gaussian logits, with means and spreads of every size."""
    mean = 2.5 * torch.randn(ROWS, 1, CLASSES, generator=generator)
    spread = 2.5 * torch.rand(ROWS, 1, 1, generator=generator)
    return mean + spread * torch.randn(ROWS, most, CLASSES, generator=generator)


def _skewed(most: int, generator) -> torch.Tensor:
    """A sure answer whose logit varies: most draws are near 1, some far below."""
    logits = torch.zeros(ROWS, most, 2)
    logits[..., 0] = 3 + 2 * torch.randn(ROWS, most, generator=generator)
    return logits


def _two_modes(most: int, generator) -> torch.Tensor:
    """Every draw is sure, of one of two answers, in a share of the draws that differs by row."""
    logits = torch.zeros(ROWS, most, CLASSES)
    share = torch.rand(ROWS, 1, generator=generator)
    second = torch.rand(ROWS, most, generator=generator) < share
    logits[..., 0], logits[..., 1] = 6.0 * ~second, 6.0 * second
    return logits


SIMULATED = {
    "Gaussian logits": _unequal_rows,
    "skewed: logit 3 +- 2": _skewed,
    "two modes": _two_modes,
}
PARTS = {
    "cost": cost,
    "growth": growth,
    "error": error,
    "memory": memory,
    "settling": settling,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(sys.argv[2])
        sys.exit()
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    chosen = [word for word in sys.argv[1:] if word in PARTS] or list(PARTS)
    print(f"{(numbers or [5])[0]} rounds, {torch.get_num_threads()} threads")
    for part in chosen:
        PARTS[part]((numbers or [5])[0])
