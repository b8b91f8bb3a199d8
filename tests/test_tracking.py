"""Trackers record without asking; the process has a name."""

import json

import pytest
from conftest import run_folder

import main


def test_tensorboard_gets_losses_and_final_metrics(causal_flags):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3"]
    flags = [flag for flag in flags if flag != "--nowand"] + ["--tracker", "tensorboard"]
    metrics = main.main(flags)
    events = EventAccumulator(str(run_folder(flags) / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/nll")] == [1, 2, 3]
    assert events.Scalars("final/acc")[0].value == pytest.approx(metrics.acc)


def test_wandb_without_credentials_goes_offline_with_a_notice(causal_flags, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(run_folder([*causal_flags, "--modelwrapper", "mle"]).parent))
    flags = [flag for flag in causal_flags if flag != "--nowand"]
    flags += ["--modelwrapper", "mle", "--max-train-steps", "2"]
    main.main(flags)
    assert capsys.readouterr().out.count("wandb has no credentials") == 1
    assert list((run_folder(flags) / "wandb").glob("offline-run-*"))


def test_a_users_own_wandb_run_is_logged_to(causal_flags):
    from conftest import build

    class Logger:
        def __init__(self):
            self.lines = []

        def log(self, values):
            self.lines.append(values)

    _, dataset, wrapper = build([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "2"])
    logger = Logger()
    wrapper.prepare_for_fit_evaluate(dataset, logger)
    wrapper.fit_evaluate()
    assert [line["train/nll"] > 0 for line in logger.lines[:2]] == [True, True]
    assert "final/ece" in logger.lines[-1]


def test_the_process_is_named_after_the_run(causal_flags, monkeypatch):
    titles = []
    monkeypatch.setattr("setproctitle.setproctitle", titles.append)
    main.main([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"])
    assert len(titles) == 1 and "mle" in titles[0] and "bbc_headlines" in titles[0]


def test_args_json_says_what_made_the_run(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    main.main(flags)
    stored = json.loads((run_folder(flags) / "args.json").read_text())
    assert stored["args"]["lr"] == 1e-2
    known = {"command", "commit", "host", "started", "python", "libraries", "num_processes"}
    assert set(stored["run"]) == known
    assert stored["run"]["libraries"]["peft"]
