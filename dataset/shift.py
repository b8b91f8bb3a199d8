r"""Errors in a text, at five strengths: shifted data that are harder than the source, on any task.

    --ood-datasets TASK:noisy:1 TASK:noisy:3 TASK:noisy:5

Calibration under a shift whose strength grows is the question of Ovadia et al. 2019 (arXiv
1906.02530), who corrupt images at five strengths; this is the like for text. With $p$ = `RATES`:

    each letter is mistyped (a neighbouring key, QWERTY) with probability p, dropped with p
    each word is dropped with probability p, and swapped with the next one with p

The errors of a text depend on nothing but that text: the random numbers are those of its SHA-256,
the same at all strengths, and an error happens where its number is below the rate. So a row has the
same errors wherever it stands, and those of a weaker shift are among those of a stronger one but
for a few swaps: a word is swapped once, so a stronger shift that swaps words i - 1 and i leaves out
the swap of i and i + 1.

What stays: labels, answers and the words around a text in a prompt; white space between words that
stay; whatever is no letter (a word without any letter is neither dropped nor swapped, so that no
WinoGrande sentence loses its blank); at least one letter of a word, and one word of a text. A
letter that is not on the keyboard is never mistyped, but may be dropped, with the marks that
combine with it.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

from dataset.sources import Row

RATES = {1: 0.01, 2: 0.02, 3: 0.04, 4: 0.07, 5: 0.10}
# rows of keys, and how far to the right each begins
_ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))


def _neighbours() -> dict[str, str]:
    """Letter -> the letters on the keys around it, in both cases."""
    places = {
        key: (x + start, y) for y, (keys, start) in enumerate(_ROWS) for x, key in enumerate(keys)
    }
    near = {
        key: "".join(
            other
            for other, (u, v) in places.items()
            if other != key and (x - u) ** 2 + (y - v) ** 2 < 1.7  # of keys that touch
        )
        for key, (x, y) in places.items()
    }
    return near | {key.upper(): others.upper() for key, others in near.items()}


NEIGHBOURS = _neighbours()


class NoisyRow(dict):
    """A row with errors in its text.

    Attributes:
        clean: the row as it was, for what must not change with the errors.
    """

    def __init__(self, row: Mapping[str, Any], clean: Row) -> None:
        super().__init__(row)
        self.clean = clean


def clean_of(row: Row) -> Row:
    """The row without errors."""
    return row.clean if isinstance(row, NoisyRow) else row


def noisy_row(row: Row, columns: Collection[str], strength: int) -> NoisyRow:
    """The row with errors in the text of some columns.

    Args:
        row: any; what is no text in these columns stays as it is.
        columns: of free text.
        strength: a key of `RATES`.
    """
    texts = {column: row[column] for column in columns if isinstance(row.get(column), str)}
    noisy = {column: noisy_text(text, strength) for column, text in texts.items()}
    return NoisyRow(row | noisy, row)


def noisy_text(text: str, strength: int) -> str:
    """The text with errors; see the module's docstring for the law of these.

    Args:
        text: any; one without letters stays as it is.
        strength: a key of `RATES`.
    """
    rate = RATES[strength]
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    numbers = random.Random(int.from_bytes(digest))
    pieces = re.split(r"(\s+)", text)
    words, spaces = pieces[::2], pieces[1::2]  # space i stands between words i and i + 1
    has_letters = [any(map(str.isalpha, word)) for word in words]
    drops, swaps = [], []
    for place, word in enumerate(words):  # the same numbers are drawn at every strength
        drops.append(numbers.random())
        swaps.append(numbers.random())
        words[place] = _noisy_word(word, rate, numbers)
    lettered = [place for place, has in enumerate(has_letters) if has]
    stays = max(lettered, key=drops.__getitem__, default=None)
    order = list(range(len(words)))
    place = 0
    while place < len(order) - 1:
        is_swapped = swaps[place] < rate and has_letters[place] and has_letters[place + 1]
        if is_swapped:
            order[place], order[place + 1] = order[place + 1], order[place]
        place += 1 + is_swapped
    out: list[str] = []
    for place, origin in enumerate(order):
        if has_letters[origin] and drops[origin] < rate and origin != stays:
            continue
        if out:
            out.append(spaces[place - 1])
        out.append(words[origin])
    return "".join(out)


def _noisy_word(word: str, rate: float, numbers: random.Random) -> str:
    """A word with letters mistyped or dropped."""
    letters: list[str] = []
    for character in word:
        if letters and unicodedata.category(character).startswith("M"):
            letters[-1] += character  # a mark that combines with it
        else:
            letters.append(character)
    errors = [(numbers.random(), numbers.random(), numbers.random()) for _ in letters]
    alphabetic = [place for place, letter in enumerate(letters) if letter[0].isalpha()]
    stays = max(alphabetic, key=errors.__getitem__, default=None)
    for place in alphabetic:
        error, kind, which = errors[place]
        if error >= 2 * rate:
            continue
        if kind >= 0.5:
            letters[place] = letters[place] if place == stays else ""
        elif keys := NEIGHBOURS.get(letters[place]):
            letters[place] = keys[int(which * len(keys))]
    return "".join(letters)
