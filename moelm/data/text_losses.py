"""Counts of what a tokenizer cannot represent: unknown tokens, and characters that are dropped or changed."""

import unicodedata
from collections import Counter
from typing import NamedTuple

from tokenizers import Tokenizer as RawTokenizer

from moelm.data.tokenizer_json import SPACE, Tree, lossless_forms


class TextLosses(NamedTuple):
    """What of some texts is not in their tokens."""

    unknown_tokens: int = 0
    unknown_characters: int = 0
    """Characters that became unknown tokens."""
    lost_characters: int = 0
    """Other characters that were dropped or changed."""


class LossCounter:
    """Compares texts with what their tokens decode to.

    Args:
        tree: the content of the tokenizer.json.
        raw: the tokenizer that decodes.
        encoder: the tokenizer that encodes.
        unknown_id: the token of unknown text.
    """

    def __init__(self, tree: Tree, raw: RawTokenizer, encoder: RawTokenizer, unknown_id: int | None) -> None:
        self._raw, self._encoder, self._unknown_id = raw, encoder, unknown_id
        self._unknown_name = Counter("" if unknown_id is None else raw.id_to_token(unknown_id))
        self._forms = lossless_forms(tree)
        self._keeps_all = tree["normalizer"] is None and self._forms is not None

    def count(self, texts: list[str], ids: list[list[int]]) -> TextLosses:
        """The losses of texts with these token ids."""
        if self._forms is not None:
            pairs = [pair for pair in zip(texts, ids, strict=True) if not self._is_exact(pair[0])]
        else:
            pairs = list(zip(texts, ids, strict=True))
        if not pairs:
            return TextLosses()
        decoded = self._raw.decode_batch([row for _, row in pairs], skip_special_tokens=False)
        losses = [
            self._compare(text, text_after, 0 if self._unknown_id is None else row.count(self._unknown_id))
            for (text, row), text_after in zip(pairs, decoded, strict=True)
            if text != text_after
        ]
        return TextLosses(*map(sum, zip(*losses, strict=True))) if losses else TextLosses()

    def _is_exact(self, text: str) -> bool:
        """Whether a tokenizer that is exact for some texts is so for this one."""
        if self._keeps_all:
            return True
        return SPACE not in text and all(unicodedata.is_normalized(form, text) for form in self._forms or ())

    def _compare(self, text: str, decoded: str, unknown_tokens: int) -> TextLosses:
        """The losses of one text, by the numbers of each character before and after."""
        before, after = Counter(text), Counter(decoded)
        unknown = self._unknown_text(text) if unknown_tokens else ""
        before -= Counter(unknown)
        after -= Counter({character: count * unknown_tokens for character, count in self._unknown_name.items()})
        missing, extra = before - after, after - before
        if decoded.startswith(" ") and not text.startswith(" "):
            extra -= Counter(" ")  # before the first word, where some tokenizers add it to every text
        lost = missing.total() or min(extra.total(), len(text) - len(unknown))
        return TextLosses(unknown_tokens, len(unknown), lost)

    def _unknown_text(self, text: str) -> str:
        """The parts of a text that became unknown tokens."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return "".join(text[start:end] for token, (start, end) in spans if token == self._unknown_id)
