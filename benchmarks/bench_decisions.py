"""Are the promises kept? A run's predictions, divided 200 times into calibration and test rows.

    python benchmarks/bench_decisions.py RUN... [--divisions 200] [--calibration 200]

Of each run's own test rows so many are drawn as calibration rows, the others are test rows. Printed
are the mean coverage of sets at 0.8, 0.9 and 0.95, and for bounds of the error rate how often there
was a rule, what share it answered, and in how many divisions more than that share of the answered
test rows was wrong. Rows of one run are divided again and again, so divisions are not independent,
and a division's test rows are a sample: some excess over the bound is the noise of that sample.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from decisions import conformal, selective
from utils.errors import UsageError
from utils.metrics import posterior_predictive
from utils.records import read_tensors

COVERAGES = (0.8, 0.9, 0.95)
RISKS = (0.05, 0.1)
CONFIDENCE = 0.9


def divisions(n: int, calibration: int, number: int):
    """(calibration rows, test rows), `number` times."""
    for seed in range(number):
        order = np.random.default_rng(seed).permutation(n)
        yield order[:calibration], order[calibration:]


def measured(run: Path, calibration: int, number: int) -> list[str]:
    """The cells of a run's line."""
    tensors = read_tensors(run / "predictions.safetensors", "bench_decisions.py")
    log_probs = posterior_predictive(tensors["log_probs"], tensors.get("num_draws"))
    probs, labels = log_probs.exp().numpy(), tensors["labels"].numpy()
    right, sure = probs.argmax(1) == labels, probs.max(1)
    covered = {level: [] for level in COVERAGES}
    answered = {risk: [] for risk in RISKS}
    exceeded = dict.fromkeys(RISKS, 0)
    for known, new in divisions(len(labels), calibration, number):
        scores = conformal.calibrate(probs[known], labels[known], "lac")
        for level in COVERAGES:
            sets = conformal.sets(probs[new], scores, level, allow_empty=True)
            covered[level].append(sets[np.arange(len(new)), labels[new]].mean())
        threshold = selective.calibrate(sure[known], right[known], "max_probability")
        for risk in RISKS:
            try:
                rule = threshold.rule(risk, CONFIDENCE)
            except UsageError:
                continue
            chosen = selective.answered(sure[new], rule, new.tolist())
            answered[risk].append(chosen.mean())
            exceeded[risk] += bool(chosen.any()) and (~right[new])[chosen].mean() > risk
    cells = [f"{np.mean(covered[level]):.3f}" for level in COVERAGES]
    for risk in RISKS:
        rules = len(answered[risk])
        share = f"{np.mean(answered[risk]):.2f}" if rules else "-"
        cells += [f"{rules}/{number}", share, f"{exceeded[risk]}/{number}"]
    return [f"{1 - right.mean():.3f}", *cells]


def main() -> None:
    """Measure every run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--divisions", type=int, default=200)
    parser.add_argument("--calibration", type=int, default=200)
    args = parser.parse_args()
    heads = ["run", "wrong", *(f"cov {level:g}" for level in COVERAGES)]
    for risk in RISKS:
        heads += [f"rules {risk:g}", "answered", "exceeded"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for run in args.runs:
        name = "/".join(run.parts[-4:-3] + run.parts[-1:])
        print("| " + " | ".join([name, *measured(run, args.calibration, args.divisions)]) + " |")


if __name__ == "__main__":
    main()
