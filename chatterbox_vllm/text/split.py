"""Long text in pieces that the model can speak well: whole sentences, as many as fit.

Where a sentence is too long it is cut at clauses, then between words, then anywhere but inside a character that is
written with several code points. Only white space is lost, and the time is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final

from chatterbox_vllm.errors import InvalidRequest
from chatterbox_vllm.text.graphemes import is_boundary

Span = tuple[int, int]

_CLOSERS: Final = r"""["'”’»›)\]}」』】）》〉〕］｝*_]*+(?:[ \u00a0\u202f][»›])?+"""
_ENDERS: Final = "。！？｡．؟۔।॥\u037e"
_SENTENCE: Final = re.compile(rf"(?P<run>[.!?…‥{_ENDERS}]+){_CLOSERS}|\n[^\S\n]*\n")
_CLAUSE: Final = re.compile(
    rf"[、，；：､،؛]{_CLOSERS}|(?:[,;:·!?…‥]|(?<!\.)\.\.++){_CLOSERS}(?=\s)|—+|(?<=\s)[–-](?=\s)|\n"
)
_WORD: Final = re.compile(r"\S+")
_BEFORE_A_FULL_STOP: Final = """
    mr mrs ms dr prof st rev gen col sgt capt lt hon jr sr vs etc al fig figs ch pp ed eds approx dept inc ltd corp bros
    jan feb apr jun jul aug sep sept oct nov dec bzw usw ca evtl ggf inkl nr str tel vgl zzgl mme mlle sra srta dra sres
    ud uds av avda pág núm sig dott ecc ул др тыс руб стр гл см рис напр
"""
_ABBREVIATIONS: Final = frozenset(_BEFORE_A_FULL_STOP.split())


def split(text: str, *, max_characters: int = 300) -> list[str]:
    """``text`` in pieces of at most ``max_characters``, each without white space at its ends.

    A piece without a letter or digit appears only where a run of such characters is too long to join its neighbour.

    Raises:
        InvalidRequest: ``max_characters`` is less than 1.
    """
    if max_characters < 1:
        raise InvalidRequest(f"max_characters must be at least 1, not {max_characters}", param="max_characters")
    whole = _trimmed(text, 0, len(text))
    return [text[start:end] for start, end in _fit(text, whole, max_characters, 0)] if whole else []


def is_speakable(text: str) -> bool:
    """Whether ``text`` has a letter or a digit."""
    return any(map(str.isalnum, text))


def _fit(text: str, span: Span, limit: int, level: int) -> list[Span]:
    """Spans of at most ``limit`` characters that cover ``span``, cut at the ends that ``level`` knows or finer."""
    if span[1] - span[0] <= limit:
        return [span]
    if level == len(_LEVELS):
        return list(_cut_anywhere(text, span, limit))
    fitting: list[Span] = []
    for start, end in _units(text, span, _LEVELS[level]):
        if fitting and end - fitting[-1][0] <= limit:
            fitting[-1] = (fitting[-1][0], end)
        else:
            fitting += _fit(text, (start, end), limit, level + 1)
    return fitting


def _units(text: str, span: Span, ends: Callable[[str, Span], Iterator[int]]) -> list[Span]:
    """``span`` cut at its ``ends``; what has no letter or digit joins the unit before it, or else the one after."""
    units: list[Span] = []
    cursor = span[0]
    for end in chain(ends(text, span), [span[1]]):
        piece = _trimmed(text, cursor, end)
        speakable = is_speakable(text[cursor:end])
        cursor = end
        if piece is None:
            continue
        if speakable:
            units.append((piece[0] if units else span[0], piece[1]))
        elif units:
            units[-1] = (units[-1][0], piece[1])
    return units or [span]


def _sentence_ends(text: str, span: Span) -> Iterator[int]:
    for match in _SENTENCE.finditer(text, *span):
        if match["run"] is None or _ends_sentence(text, match):
            yield match.end()


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    run, after = match["run"], text[match.end() : match.end() + 1]
    if run == "．" and after.isdigit():
        return False
    if not after or not set(run).isdisjoint(_ENDERS):
        return True
    if not after.isspace():
        return run[-1] != "." and after.isalpha() and not after.isupper() and not after.islower()
    if run == ".":
        return not _is_abbreviation(text[max(0, match.start() - 12) : match.start()])
    trails_off = run[-1] in ".…‥" or match.end("run") < match.end()
    return not (trails_off and text[match.end() : match.end() + 3].lstrip()[:1].islower())


def _is_abbreviation(before: str) -> bool:
    """Whether a full stop after ``before`` belongs to its last word: Mr. e.g. J. 3. (the third), z. B."""
    word = before.split()[-1].lstrip("([{\"'“‘«¿¡") if before.split() else ""
    if word.isdigit():
        return len(word) <= 2
    is_initial = len(word) == 1 and word.lower() != word.upper()
    return is_initial or "." in word or word.casefold() in _ABBREVIATIONS


def _clause_ends(text: str, span: Span) -> Iterator[int]:
    return (match.end() for match in _CLAUSE.finditer(text, *span))


def _word_ends(text: str, span: Span) -> Iterator[int]:
    return (match.end() for match in _WORD.finditer(text, *span))


_LEVELS: Final = (_sentence_ends, _clause_ends, _word_ends)


def _cut_anywhere(text: str, span: Span, limit: int) -> Iterator[Span]:
    """Nearly equal parts, so that no tiny one is left, cut inside a written character only if it exceeds ``limit``."""
    start, end = span
    while end - start > limit:
        parts = -(-(end - start) // limit)
        furthest = start - (start - end) // parts
        cut = next((at for at in range(furthest, start, -1) if is_boundary(text, at, start)), furthest)
        if part := _trimmed(text, start, cut):
            yield part
        start = cut
    if part := _trimmed(text, start, end):
        yield part


def _trimmed(text: str, start: int, end: int) -> Span | None:
    """The span without white space at its ends; None if nothing is left."""
    piece = text[start:end]
    length = len(piece.strip())
    first = start + len(piece) - len(piece.lstrip())
    return (first, first + length) if length else None
