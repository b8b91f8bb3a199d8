"""List the tasks, each with an example as a model reads it: python scripts/tasks.py [NAME...]

A NAME is a data set's, or FILE.py:NAME for a record of your own.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset import DATASETS
from dataset.record import Prompt, Task, checked_task
from dataset.sources import Hub, HubGroup
from utils.errors import UsageError
from utils.registry import lookup, users_code


def origin(task: Task) -> str:
    """Hub id and configurations, or that the rows are embedded or local."""
    source = task.source
    if isinstance(source, HubGroup):
        return f"{source.path} ({', '.join(source.configs)})"
    if isinstance(source, Hub):
        return f"{source.path} ({source.config})" if source.config else source.path
    return "--data-dir" if source is None else "embedded"


def describe(name: str, task: Task) -> str:
    """Name as in --dataset, source, splits, answers, and the rendered example with its answer."""
    splits = ", ".join(f"{name}: {split}" for name, split in task.splits.items())
    lines = [f"{origin(task)}; {splits}", f"answers: {', '.join(task.choices)}", ""]
    if task.example is None:
        return "\n".join([f"## {name}", "", *lines, "The record has no example.", ""])
    with users_code(f"the example of {task.name}"):
        rendered = task.prompt(task.example)
        answer = "(none of them)" if task.label is None else task.choices[task.label(task.example)]
        is_prompt = isinstance(rendered, Prompt)
        text = (
            f"{''.join(rendered)} {answer}" if is_prompt else "\n".join([*rendered, f"-> {answer}"])
        )
    kind = "mcdataset" if is_prompt else "bertds"
    return "\n".join([f"## {name} ({kind})", "", *lines, "```", text, "```", ""])


def chosen(names: list[str]) -> list[tuple[str, Task]]:
    """The tasks of these names, of every kind that has one; all without a name.

    Raises:
        UsageError: there is no task of a name.
    """
    tables = [cls.tasks for cls in DATASETS.values()]
    if not names:
        return [named for table in tables for named in table.items()]
    known = {name: task for table in tables for name, task in table.items()}
    tasks = []
    for name in names:
        found = checked_task(lookup(known, name, "data set"), name)
        of_name = [
            (key, task)
            for table in tables
            for key, task in table.items()
            if key.lower() == name.lower()
        ]
        tasks += of_name or [(found.name, found)]
    return tasks


if __name__ == "__main__":
    try:
        for name, task in chosen(sys.argv[1:]):
            print(describe(name, task))
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
