"""The README.md of an adapter on the hub: which method, which data, which metrics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TEMPLATE = """---
library_name: peft
{base_model}tags:
- lora
- uncertainty
- calibration
- {modelwrapper}
---

# {modelwrapper} posterior over a LoRA adapter of {model}

- Method: `{modelwrapper}`{settings}
- Data: `{dataset}`, answers {choices}
- Prediction: mean probability over {n_draws} draw(s)

{metrics}

## Use

With the Bayesian PEFT project, posterior included:

```python
from modelwrappers import load_posterior

posterior = load_posterior("<this repository or a local folder>")
for answer in posterior.answer([...]):  # rows of its task, without labels
    print(answer["answer"], answer["probabilities"], answer["mutual_information"])
```
{calibration}
With PEFT alone, `PeftModel.from_pretrained` reads the posterior mean.
"""


CALIBRATED = """
`answer(rows, coverage=0.9)` adds sets that have the right answer with that probability, and
`max_risk=0.05` says where the answer should be given: for rows like the {rows} calibration rows,
which the adapter was not trained on, and for no others.
"""


def model_card(config: dict[str, Any]) -> str:
    """The card of an adapter, from its bayes_config.json."""
    lines = ["No evaluation is stored with this adapter."]
    if config["metrics"]:
        lines = [
            "| data set | split | n | draws | ACC | ECE | NLL | Brier |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, block in config["metrics"].items():
            numbers = " | ".join(f"{block[key]:.4f}" for key in ("acc", "ece", "nll", "brier"))
            count, draws = block.get("n_examples", "?"), block.get("n_draws", "?")
            lines.append(f"| {name} | {block['split']} | {count} | {draws} | {numbers} |")
    # The hub takes ids only, and a path would tell of the machine.
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", config["model"]) is not None
    model = config["model"] if is_hub_id else Path(config["model"]).name
    calibration = config.get("calibration")
    flags = ", ".join(f"{key} {value}" for key, value in config.get("flags", {}).items())
    return TEMPLATE.format(
        model=model,
        base_model=f"base_model: {model}\n" if is_hub_id else "",
        modelwrapper=config["modelwrapper"],
        settings=f" ({flags})" if flags else "",
        dataset=config["dataset"],
        choices=", ".join(config["choices"] or ["unknown"]),
        n_draws=config["n_draws"],
        metrics="\n".join(lines),
        calibration=CALIBRATED.format(rows=calibration["rows"]) if calibration else "",
    )
