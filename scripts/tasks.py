"""List the tasks, each with an example as a model reads it: python scripts/tasks.py [NAME...]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset import DATASETS
from dataset.sources import Hub, HubGroup
from dataset.tasks import Task
from utils.registry import did_you_mean


def origin(task: Task) -> str:
    """Hub id and configurations, or that the rows are embedded."""
    source = task.source
    if isinstance(source, HubGroup):
        return f"{source.path} ({', '.join(source.configs)})"
    if isinstance(source, Hub):
        return f"{source.path} ({source.config})" if source.config else source.path
    return "embedded"


def describe(kind: str, task: Task) -> str:
    """Name, source, splits, answers, and the rendered example with its answer."""
    splits = ", ".join(f"{name}: {split}" for name, split in task.splits.items())
    row, answer = task.example, task.choices[task.label(task.example)]
    rendered = task.prompt(row)
    if kind == "mcdataset":
        text = f"{''.join(rendered)} {answer}"
    else:
        text = "\n".join([*rendered, f"-> {answer}"])
    lines = [f"## {task.name} ({kind})", "", f"{origin(task)}; {splits}"]
    lines += [f"answers: {', '.join(task.choices)}", "", "```", text, "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    known = {name for cls in DATASETS.values() for name in cls.tasks}
    for wanted in sys.argv[1:]:
        if wanted not in known:
            sys.exit(f"unknown task '{wanted}'{did_you_mean(wanted, known)}")
    for kind, cls in DATASETS.items():
        for name, task in cls.tasks.items():
            if not sys.argv[1:] or name in sys.argv[1:]:
                print(describe(kind, task))
