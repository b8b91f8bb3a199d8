"""Where rows come from: the hub, local files in the hub's schema, or the embedded corpus.

A row is a plain dict in the hub's own columns, or in those of a user's own table
(`dataset.tables` makes a task of it). `load_rows` also says where each row stands, so that
a message about a bad row can name its file and line. A file gives all of its rows or an error:
nothing that cannot be read is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.files import Row, as_row, rows_of_file
from utils.data_set_names import SUFFIXES
from utils.embedded import SPLITS, bbc_articles
from utils.errors import UsageError, described, quoted
from utils.hub import go_offline_if_unreachable
from utils.registry import users_code


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub: its full id and configuration."""

    path: str
    config: str | None = None

    def rows(self, split: str) -> list[tuple[str, Row]]:
        from datasets import load_dataset

        go_offline_if_unreachable()
        try:
            data = load_dataset(self.path, self.config, split=split)
            return [(f"{self.path} [{split}] row {i}", row) for i, row in enumerate(data)]
        except Exception as error:
            # datasets raises many classes for "no network", "no such set", "no such split".
            raise UsageError(
                f"the data set {self.path} ({self.config or 'default'}, split {split}) cannot be "
                f"loaded from the hub: {described(error)}\n"
                "Without network access, put the rows in local files and pass --data-dir DIR, with "
                f"DIR/{split}.jsonl (or .json, .csv, .parquet) in the hub's own columns; or use an "
                "embedded data set: --dataset bbc_headlines."
            ) from None


@dataclass(frozen=True)
class HubGroup:
    """Several configurations of one data set on the hub, one after the other (MMLU's subjects)."""

    path: str
    configs: tuple[str, ...]

    def rows(self, split: str) -> list[tuple[str, Row]]:
        return [row for config in self.configs for row in Hub(self.path, config).rows(split)]


@dataclass(frozen=True)
class BBCNews:
    """The embedded corpus: `text` (headline or body) and `topic` of each article.

    Attributes:
        text: "headline" or "body".
        version: of the division; see `bbc_articles`.
        topics: of which there are articles; None: all.
    """

    text: str
    version: int = SPLITS[-1]
    topics: tuple[str, ...] | None = None

    def rows(self, split: str) -> list[tuple[str, Row]]:
        return [
            (
                f"embedded corpus [{split}] '{a['headline']}'",
                {"text": a[self.text], "topic": a["topic"]},
            )
            for a in bbc_articles(self.version)
            if a["split"] == split
            and a[self.text]
            and (self.topics is None or a["topic"] in self.topics)
        ]


Source = Hub | HubGroup | BBCNews


def load_rows(
    source: Source | None,
    split: str,
    data_dir: str | None,
    name: str,
    example: Mapping[str, Any] | None = None,
) -> list[tuple[str, Row]]:
    """(where, row) of one split, from `data_dir` if given, else from the task's own source.

    Several data sets may stand in one `data_dir`, each in a folder of its name.

    Args:
        source: where the rows are, without a `data_dir`.
        split: the source's name of it.
        data_dir: the folder of local files, if any.
        name: the task's.
        example: a row. A column that has text in it is text in a CSV, too, whatever it looks like.
    Raises:
        UsageError: nothing can be found or read there; the message says what was looked for.
    """
    if data_dir:
        folder = Path(data_dir)
        folder = folder / name if is_folder(folder / name) else folder
        texts = {key for key, value in (example or {}).items() if isinstance(value, str)}
        return _local_rows(folder, split, texts)
    if source is None:
        raise UsageError(f"{name} names no source of its rows; pass --data-dir DIR.")
    with users_code(f"the rows of {name}"):  # a source may be a user's own class
        rows = [(str(where), as_row(row, str(where))) for where, row in source.rows(split)]
    if not rows:
        raise UsageError(f"{quoted(repr(source))} has no rows in split '{split}'.")
    return rows


def is_folder(path: Path) -> bool:
    """Whether there is a folder that can be looked into; never an error."""
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, a parent that may not be entered
        return False


# --- local files ----------------------------------------------------------------------------------


def _local_rows(folder: Path, split: str, texts: set[str]) -> list[tuple[str, Row]]:
    if not is_folder(folder):
        raise UsageError(f"--data-dir: there is no folder {quoted(str(folder))} that can be read.")
    names = [f"{split}{suffix}" for suffix in SUFFIXES]
    try:
        # listed, not asked for one by one: a link that leads nowhere is a mistake, not an absence
        present = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise UsageError(f"--data-dir: {folder} cannot be read ({error.strerror}).") from None
    found = [name for name in names if name in present]
    if not found:
        raise UsageError(f"--data-dir: {folder} has none of {', '.join(names)}.")
    if len(found) > 1:
        raise UsageError(
            f"--data-dir: {folder} has {' and '.join(found)}; keep one of them, so that it is "
            "clear which rows are meant."
        )
    return rows_of_file(folder / found[0], "--data-dir", texts)
