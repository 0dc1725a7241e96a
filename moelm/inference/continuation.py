"""The text of generated tokens: decoded in the context of the prompt, streamed, and ended by stop texts.

The text of several tokens is not the concatenation of theirs: a character may take several tokens, and a space depends on
whether a word is the first one.
"""

from collections.abc import Callable, Iterator, Sequence

from moelm.data.tokenizer import Tokenizer

CONTEXT_TOKENS = 16
"""Tokens before the new ones that are decoded together with them, at least; a character of bytes is never cut."""
INCOMPLETE = "\ufffd"
"""What decoders write for the bytes of an incomplete character."""


class ContextDecoder:
    """The text that tokens add to the text before them.

    With byte fallback, a complete character is final. The library's decoder instead replaces all bytes in succession while
    one of their characters is incomplete, which would make a text in byte tokens unreadable up to its end.

    Args:
        context: the tokens before.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._settled = ""
        """Text that more tokens cannot change."""
        self._open = ""
        """Text after it."""
        self._bytes: list[int] = []
        """Byte tokens of an incomplete character; not in the window."""
        self._window = [token for token in context if token in tokenizer.text_ids]
        """The tokens that are decoded together: those of `_before`, and those of `_open`."""
        self._before = ""
        self._shorten_at = 0
        self._separate_bytes()
        self._start_window()

    @property
    def text(self) -> str:
        """The text of all added tokens, as it is if no more follow."""
        return self._settled + self._open + INCOMPLETE * len(self._bytes)

    @property
    def settled_len(self) -> int:
        """Characters of the text that more tokens cannot change."""
        return len(self._settled) + len(self._open.rstrip(INCOMPLETE))

    def add(self, token: int) -> None:
        """Append a token."""
        if token not in self._tokenizer.text_ids:
            return
        if token in self._tokenizer.byte_ids:
            for complete in self._complete_bytes(token):
                self._append(complete)
        else:
            self._give_up_bytes()
            self._append([token])

    def _append(self, tokens: list[int]) -> None:
        """Append tokens that do not end inside a byte-fallback character."""
        self._window += tokens
        decoded = self._tokenizer.decode(self._window)
        start = len(self._before)
        if self._before.endswith(INCOMPLETE) and not decoded.startswith(self._before):
            pairs = enumerate(zip(decoded, self._before, strict=False))
            start = next((i for i, (a, b) in pairs if a != b), min(len(decoded), start))
        self._open = decoded[start:]
        if self._open and not self._open.endswith(INCOMPLETE):
            self._settled, self._open = self._settled + self._open, ""
            self._start_window()

    def _complete_bytes(self, token: int) -> Iterator[list[int]]:
        """Take up a byte token, and yield the tokens of a character that it completes."""
        values = self._tokenizer.byte_ids
        self._bytes.append(token)
        try:
            bytes(values[each] for each in self._bytes).decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return
            self._bytes.pop()
            if self._bytes:  # the new byte may begin another character
                self._give_up_bytes()
                yield from self._complete_bytes(token)
            else:
                self._settle(INCOMPLETE)
        else:
            yield self._bytes
            self._bytes = []

    def _give_up_bytes(self) -> None:
        """Settle the bytes of a character that was not completed."""
        self._settle(INCOMPLETE * len(self._bytes))
        self._bytes = []

    def _settle(self, text: str) -> None:
        if text:
            self._settled, self._open = self._settled + self._open + text, ""
            self._start_window()

    def _separate_bytes(self) -> None:
        """Take an incomplete character, and bytes that are none, out of the byte tokens at the end of the context."""
        size = next((n for n, token in enumerate(reversed(self._window)) if token not in self._tokenizer.byte_ids), None)
        start = 0 if size is None else len(self._window) - size
        run, self._window = self._window[start:], self._window[:start]
        for token in run:
            for complete in self._complete_bytes(token):
                self._window += complete
        self._settled = ""

    def _start_window(self) -> None:
        """Make the window's tokens the context of the following ones, without those that are too far back."""
        self._before = self._tokenizer.decode(self._window)
        if len(self._window) < self._shorten_at:
            return
        for start in range(len(self._window) - CONTEXT_TOKENS, 0, -1):
            if 0x80 <= self._tokenizer.byte_ids.get(self._window[start], 0) < 0xC0:
                continue  # inside a character
            text = self._tokenizer.decode(self._window[start:])
            # A word at the beginning may lose its space, so the context must be more than spaces.
            if self._before.endswith(text) and text.strip() and not text.startswith(INCOMPLETE):
                self._window, self._before = self._window[start:], text
                break
        self._shorten_at = 2 * max(len(self._window), CONTEXT_TOKENS)


class Continuation:
    """The tokens and the text generated after one prompt.

    Args:
        prompt: the prompt's tokens.
        stops: texts that end the continuation.
        stream: receives the text piece by piece.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        stream: Callable[[str], None] | None = None,
    ) -> None:
        self._decoder = ContextDecoder(tokenizer, prompt)
        self._eos_ids, self._stops, self._stream = tokenizer.eos_ids, stops, stream
        self._held_back = max(map(len, stops), default=1) - 1
        """Characters that may be the beginning of a stop text."""
        self._searched = 0
        """Characters without a stop text that more tokens cannot change."""
        self._streamed = 0
        self.ids: list[int] = []
        self.text = ""
        self.done = False
        """Whether an end token or a stop text was generated."""

    def add(self, token: int) -> None:
        """Append a token, unless the text is done."""
        if self.done:
            return
        if token in self._eos_ids:
            self.done = True
            return
        self.ids.append(token)
        self._decoder.add(token)
        self.text = self._decoder.text
        self._search_up_to(self._decoder.settled_len)
        self._stream_up_to(len(self.text) if self.done else self._searched - self._held_back)

    def finish(self) -> str:
        """Stream the rest of the text, an incomplete character included, and return the whole text."""
        self._search_up_to(len(self.text))
        self._stream_up_to(len(self.text))
        return self.text

    def _search_up_to(self, end: int) -> None:
        """End the text at the first stop text in it."""
        first = max(0, self._searched - self._held_back)
        ends = [position for stop in self._stops if (position := self.text.find(stop, first, end)) >= 0]
        self._searched = end
        if ends:
            self.text, self.done = self.text[: min(ends)], True

    def _stream_up_to(self, end: int) -> None:
        if self._stream is not None and end > self._streamed:
            self._stream(self.text[self._streamed : end])
            self._streamed = end
