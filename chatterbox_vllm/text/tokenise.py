"""Text to token ids, as upstream's tokenizers give them, except that no user can type a control token.

Upstream writes its own tokens into the text ("[SPACE]", "[de]", "[cj_a]") and lets the tokenizer find them again, so
a user who writes "[STOP]" gets the stop token. Here the text is cut where our tokens go, the pieces are encoded by a
copy of the tokenizer that knows no control tokens, and the ids of ours are put between. For any other text the ids
are upstream's: its tokenizer also cuts at control tokens first and encodes the pieces on their own.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from tokenizers import AddedToken, Tokenizer

from chatterbox_vllm.errors import CheckpointError, InvalidRequest
from chatterbox_vllm.text.cangjie import CangjieTable
from chatterbox_vllm.text.languages import preprocess
from chatterbox_vllm.types import START_TEXT, STOP_TEXT

if TYPE_CHECKING:
    from chatterbox_vllm.checkpoint import Checkpoint

logger = logging.getLogger(__name__)
_SPACE: Final = "[SPACE]"


class TextTokenizer(Protocol):
    """Turns normalised text into token ids, without start and stop."""

    def encode(self, text: str, language: str | None = None) -> list[int]:
        """Token ids of ``text``, the output of ``punc_norm``."""
        ...


class EnglishTokenizer:
    """Upstream's ``EnTokenizer`` over its ``tokenizer.json``.

    Raises:
        CheckpointError: the file cannot be read or lacks a token that the model relies on.
    """

    def __init__(self, path: Path) -> None:
        self._vocabulary = _Vocabulary(path)

    def encode(self, text: str, language: str | None = None) -> list[int]:
        """Token ids of ``text``; ``language`` makes no difference."""
        return self._vocabulary.encode(text)


class MultilingualTokenizer:
    """Upstream's ``MTLTokenizer`` over its ``grapheme_mtl_merged_expanded_v1.json``.

    Args:
        path: the tokenizer's file.
        cangjie: the checkpoint's ``Cangjie5_TC.json``; without it Chinese is spoken badly, after a warning.

    Raises:
        CheckpointError: a file cannot be read, or the tokenizer lacks a token that the model relies on.
    """

    def __init__(self, path: Path, cangjie: Path | None = None) -> None:
        self._vocabulary = _Vocabulary(path)
        self._cangjie = CangjieTable(cangjie) if cangjie else None
        self._warned = False

    def encode(self, text: str, language: str | None = None) -> list[int]:
        """Token ids of ``text``: the language's token, if one is given, then those of the preprocessed text.

        Raises:
            InvalidRequest: the tokenizer has no token for the language.
        """
        ids = [self._language_id(language)] if language else []
        text = preprocess(text, language)
        return ids + (self._chinese(text) if language == "zh" else self._vocabulary.encode(text))

    def _language_id(self, language: str) -> int:
        id_ = self._vocabulary.controls.get(f"[{language}]")
        if id_ is None:
            raise InvalidRequest(f"this checkpoint does not know language {language!r}", param="language_id")
        return id_

    def _chinese(self, text: str) -> list[int]:
        if self._cangjie is None:
            self._warn_of_missing_table()
            return self._vocabulary.encode(text)
        ids: list[int] = []
        other = ""
        for character in text:
            tokens = self._cangjie.tokens(character)
            known = [self._vocabulary.controls[token] for token in tokens if token in self._vocabulary.controls]
            if not tokens or len(known) < len(tokens):
                other += "".join(tokens) or character
                continue
            ids += self._vocabulary.encode(other) + known
            other = ""
        return ids + self._vocabulary.encode(other)

    def _warn_of_missing_table(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("the checkpoint has no Cangjie5_TC.json: Chinese characters reach the model as unknown")


def load_tokenizer(checkpoint: Checkpoint) -> TextTokenizer:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: a file cannot be read, or lacks a token that the model relies on.
    """
    if checkpoint.variant.is_multilingual:
        return MultilingualTokenizer(checkpoint.tokenizer, checkpoint.cangjie)
    return EnglishTokenizer(checkpoint.tokenizer)


class _Vocabulary:
    """A tokenizer's file in two: the ids of its control tokens, and a tokenizer that does not know them."""

    def __init__(self, path: Path) -> None:
        self.controls, self._plain = _load(path)
        for name, expected in (("[START]", START_TEXT), ("[STOP]", STOP_TEXT)):
            if self.controls.get(name) != expected:
                raise CheckpointError(f"{path}: {name} must be token {expected}, not {self.controls.get(name)}")
        if _SPACE not in self.controls:
            raise CheckpointError(f"{path}: the token {_SPACE} is missing")
        self._space = self.controls[_SPACE]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, with the space token for each space and no other control token."""
        ids: list[int] = []
        for word in text.split(" "):
            ids += self._plain.encode(word).ids
            ids.append(self._space)
        return ids[:-1]


def _load(path: Path) -> tuple[dict[str, int], Tokenizer]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        added = Tokenizer.from_str(json.dumps(description)).get_added_tokens_decoder()
        controls = {token.content: id_ for id_, token in added.items() if _is_control(token)}
        kept = [token for token in description["added_tokens"] if token["content"] not in controls]
        return controls, Tokenizer.from_str(json.dumps({**description, "added_tokens": kept}))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error


def _is_control(token: AddedToken) -> bool:
    return token.special or (token.content.startswith("[") and token.content.endswith("]"))
