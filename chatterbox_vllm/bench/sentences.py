"""Texts to be spoken: our own, the same for every server that is compared, or a file's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from chatterbox_vllm.errors import ConfigurationError

CHARACTERS_A_SECOND: Final = 15.0
"""English read aloud, roughly."""
_SENTENCES: Final = (
    "The train from the coast was late again this morning.",
    "She kept the letters in a blue box under the stairs.",
    "Nobody on the island remembers a winter as mild as this one.",
    "Please leave the parcel with the neighbour across the street.",
    "He opened the window and listened to the rain.",
    "The bakery on the corner sells out of rye bread before nine.",
    "After the meeting, they walked slowly along the river.",
    "There are two ways to the summit, and both are steep.",
    "I would rather call you back tomorrow, if that is all right.",
    "A small brown dog waited outside the library all afternoon.",
    "The old clock in the hall strikes thirteen at noon.",
    "We planted six apple trees and lost only one to the frost.",
    "Her brother repairs violins in a workshop behind the church.",
    "The report should arrive by Friday at the latest.",
    "Most of the guests had left before the music began.",
    "Turn left at the lighthouse and follow the stone wall.",
    "It takes some patience, but the lock does open.",
    "The children built a boat out of cardboard and string.",
    "Last year the harvest was over by the end of August.",
    "Could you read me the last line once more?",
    "Yes, of course.",
    "The water is cold, but you get used to it quickly.",
    "Every seat was taken, so we stood at the back.",
    "That was the year the bridge was closed for repairs.",
)


def read(file: Path, param: str) -> list[str]:
    """The texts of a file, one a line; see ``lines``."""
    return list(lines(file, param).values())


def lines(file: Path, param: str) -> dict[int, str]:
    """The texts of a file by the numbers of their lines, of which blank ones hold none.

    Raises:
        ConfigurationError: it cannot be read, or has none; names the option ``param``.
    """
    try:
        found = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{param} {file} cannot be read as UTF-8 ({error})", param=param) from error
    if not (texts := {number: line.strip() for number, line in found if line.strip()}):
        raise ConfigurationError(f"{param} {file} holds no text; write a text on each line", param=param)
    return texts


def text(seed: int, seconds: float) -> str:
    """Whole sentences, drawn by ``seed``, that take about ``seconds`` to read aloud."""
    draw = random.Random(seed)
    target = seconds * CHARACTERS_A_SECOND
    drawn = draw.choice(_SENTENCES)
    while len(drawn) < target:
        longer = f"{drawn} {draw.choice(_SENTENCES)}"
        if len(longer) - target > target - len(drawn):
            break
        drawn = longer
    return drawn
