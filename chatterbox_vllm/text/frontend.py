"""From what a caller wrote to token ids: validate, split, normalise, tokenise."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from chatterbox_vllm.errors import InvalidRequest, TooLarge
from chatterbox_vllm.text.languages import check_language
from chatterbox_vllm.text.normalise import punc_norm
from chatterbox_vllm.text.split import is_speakable, split
from chatterbox_vllm.text.tokenise import TextTokenizer
from chatterbox_vllm.types import MAX_TEXT_TOKENS

_UNUSABLE: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class TextFrontend:
    """The text side of one checkpoint. Thread-safe.

    Args:
        tokenizer: the checkpoint's.
        multilingual: whether the checkpoint speaks ``SUPPORTED_LANGUAGES`` or English only.
    """

    def __init__(self, tokenizer: TextTokenizer, *, multilingual: bool) -> None:
        self._tokenizer = tokenizer
        self._multilingual = multilingual

    def prepare(
        self,
        text: str,
        language: str | None = None,
        *,
        max_characters: int = 300,
        max_tokens: int = MAX_TEXT_TOKENS,
        param: str = "text",
    ) -> list[list[int]]:
        """Token ids of each piece of ``text``, to be spoken one after the other.

        A text of at most ``max_characters`` whose ids are at most ``max_tokens`` is one piece, and then the ids are
        upstream's for the whole text.

        Args:
            text: what to speak.
            language: code of one of ``SUPPORTED_LANGUAGES``; None = no language token, as upstream does.
            max_characters: longest piece.
            max_tokens: most ids in a piece, at least 1.
            param: name of the text's argument or field, for errors.

        Raises:
            InvalidRequest: the text is not a string, is blank or has control characters, or the model does not speak
                the language.
            TooLarge: one character alone takes more than ``max_tokens``.
        """
        check_text(text, param=param)
        code = self._language(language)
        pieces = split(text, max_characters=max_characters)
        if len(pieces) == 1:
            pieces = [text]  # with the white space around it, which keeps upstream from capitalising what follows
        spoken = [piece for piece in pieces if is_speakable(piece)] or pieces
        return [ids for piece in spoken for ids in self._within(piece, code, max_tokens, param)]

    def one(self, text: str, language: str | None = None, *, param: str = "text") -> list[int]:
        """Token ids of ``text`` in one piece, upstream's.

        Raises:
            InvalidRequest: as ``prepare``.
            TooLarge: more than ``MAX_TEXT_TOKENS`` ids.
        """
        check_text(text, param=param)
        ids = self._encode(text, self._language(language))
        if len(ids) > MAX_TEXT_TOKENS:
            raise TooLarge(f"{param} takes {len(ids)} tokens; the model reads {MAX_TEXT_TOKENS} at once", param=param)
        return ids

    def _within(self, piece: str, language: str | None, max_tokens: int, param: str) -> list[list[int]]:
        ids = self._encode(piece, language)
        if len(ids) <= max_tokens:
            return [ids]
        if len(piece) == 1:
            raise TooLarge(f"{param}: {piece!r} alone takes {len(ids)} tokens of {max_tokens}", param=param)
        halves = split(piece, max_characters=(len(piece) + 1) // 2)
        return [ids for half in halves for ids in self._within(half, language, max_tokens, param)]

    def _encode(self, text: str, language: str | None) -> list[int]:
        return self._tokenizer.encode(punc_norm(text, multilingual=self._multilingual), language)

    def _language(self, language: str | None) -> str | None:
        if language is None:
            return None
        code = check_language(language)
        if self._multilingual:
            return code
        if code != "en":
            raise InvalidRequest(f"this model speaks English only, not {code!r}", param="language_id")
        return None


def check_text(text: str, *, param: str = "text") -> None:
    """Refuse what cannot be spoken.

    Raises:
        InvalidRequest: ``text`` is not a string, is blank, has a control character other than tab, newline and
            carriage return, or has half of a surrogate pair; ``param`` names it.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} must be a string, not {type(text).__name__}", param=param)
    if bad := _UNUSABLE.search(text):
        raise InvalidRequest(f"{param} has {_described(bad[0])} at position {bad.start()}; remove it", param=param)
    if all(character.isspace() or unicodedata.category(character) == "Cf" for character in text):
        raise InvalidRequest(f"{param} is empty; give it something to speak", param=param)


def _described(character: str) -> str:
    kind = "half of a surrogate pair" if unicodedata.category(character) == "Cs" else "the control character"
    return f"{kind} U+{ord(character):04X}{' (NUL)' if character == chr(0) else ''}"
