"""What a report costs: python benchmarks/bench_report.py [EXAMPLES DRAWS CLASSES RESAMPLES]

Two runs with predictions of 100,000 examples x 10 draws x 5 classes by default and a shifted set as
large, written to a temporary folder; then everything that `scripts/report.py` does after its
imports. Beside it the same bootstrap by a plain loop over resamples of scikit-learn's and
torchmetrics' functions, six metrics only, timed on a few resamples.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import common  # noqa: F401  (the repository's path)
import torch
from sklearn.metrics import roc_auc_score

from report.collect import Options, collect
from report.predictions import read_predictions
from report.runs import find_runs
from report.write import write
from utils.files import write_json, write_tensors
from utils.metrics import posterior_predictive, score

LOOP = 10  # resamples of the plain loop


def make_run(folder: Path, method: str, seed: int, shape: tuple[int, int, int]) -> None:
    """A finished run: an over-confident posterior, as its files."""
    generator = torch.Generator().manual_seed(seed)
    n, num_draws, num_classes = shape
    blocks = {}
    truth = 2 * torch.randn(n, 1, num_classes, generator=torch.Generator().manual_seed(0))
    order = torch.Generator().manual_seed(1)
    labels = truth[:, 0].softmax(-1).multinomial(1, generator=order)[:, 0]
    for name, stem in (("bbc_headlines", "predictions"), ("shifted", "predictions-shifted")):
        noise = torch.randn(n, num_draws, num_classes, generator=generator)
        tensors = {
            "log_probs": (1.5 * truth + noise).log_softmax(-1),
            "labels": labels,
            "index": torch.arange(n),
        }
        metadata = {"dataset": name, "split": "val", "seed": str(seed), "modelwrapper": method}
        write_tensors(folder / f"{stem}.safetensors", tensors, metadata)
        blocks[name] = {"split": "val", **score(tensors["log_probs"], labels)._asdict()}
    args = {"dataset": "bbc_headlines", "modelwrapper": method, "seed": seed}
    write_json(folder / "args.json", {"args": args, "given": args, "run": {}})
    content = {"modelwrapper": method, "model": "none", "seed": seed, "datasets": blocks}
    write_json(folder / "metrics.json", content)


def plain_loop(log_probs: torch.Tensor, labels: torch.Tensor) -> float:
    """Seconds per resample."""
    n = len(labels)
    started = time.perf_counter()
    for number in range(LOOP):
        index = torch.randint(n, (n,), generator=torch.Generator().manual_seed(number))
        drawn, truth = log_probs[index], labels[index]
        score(drawn, truth)
        probs = drawn.exp()
        errors = (probs.argmax(-1) != truth).numpy()
        for uncertainty in (1 - probs.max(-1).values, -(probs * drawn).sum(-1)):
            roc_auc_score(errors, uncertainty.numpy())
    return (time.perf_counter() - started) / LOOP


def main() -> None:
    numbers = [int(text) for text in sys.argv[1:]] or [100_000, 10, 5, 1000]
    shape, resamples = tuple(numbers[:3]), numbers[3]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for method in ("map", "blob"):
            make_run(root / f"{method}-seed1", method, 1, shape)
        started = time.perf_counter()
        runs, skipped = find_runs([root])
        report = collect(runs, skipped, Options(resamples=resamples))
        collected = time.perf_counter()
        made = {"command": "bench_report.py", "commit": "", "time": ""}
        write(report, root / "report", made)
        written = time.perf_counter()
        predictions = read_predictions(runs[0].evaluations[0])
        log_probs = posterior_predictive(torch.from_numpy(predictions.draws))
        each = plain_loop(log_probs, torch.from_numpy(predictions.labels))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    evaluations = 2 * len(runs)
    seconds = collected - started
    cells = len(report.families[0].rows[0].cells)
    print(f"{shape} examples, draws, classes; {evaluations} evaluations, {resamples} resamples")
    print(f"measured and resampled: {seconds:.1f} s, {seconds / evaluations:.1f} s per evaluation")
    print(f"tables, plots and page: {written - collected:.1f} s; peak memory {peak:.0f} MiB")
    print(f"plain loop, 6 of {cells} metrics: {each * resamples:.1f} s per evaluation")
    print(f"ratio, plain loop / here: {each * resamples * evaluations / max(seconds, 1e-9):.1f}")


if __name__ == "__main__":
    main()
