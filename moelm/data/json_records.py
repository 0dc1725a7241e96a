"""Records of a JSON file: an array of objects, one object a line, or a single object."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from moelm.data.files import BOM, bare_suffix, numbered_lines, open_text, too_long
from moelm.errors import MoelmError

REPEATED = object()
"""The value of a name that appears several times in one object."""

_CHUNK_CHARS = 1 << 16
_PROBED_LINES = 5
_PROBED_CHARS = 1 << 22
_NOT_SPACE = re.compile(r"[^ \t\r\n]")
_ARRAY_OF_OBJECTS = re.compile(r'\s*\[\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')


def read_json(path: Path, max_chars: int) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSON file, each with its origin.

    Args:
        path: the file; a name in .json may hold any of the three forms, other names an array or one object a line.
        max_chars: maximum length of one object's text.

    Raises:
        MoelmError: malformed JSON, or a value that is not an object.
    """
    with open_text(path) as file:
        found = _NOT_SPACE.search(file.read(_CHUNK_CHARS))
    if found and found[0] == "[":
        yield from _read_array(path, max_chars)
    elif bare_suffix(path) == ".json" and not _is_object(_first_line(path, max_chars)):
        with open_text(path) as file:
            text = file.read(max_chars + 1)
        if len(text) > max_chars:
            raise too_long(str(path), len(text), max_chars, at_least=True)
        if text.strip():
            yield _parse_object(text, str(path)), str(path)
    else:
        for number, line in numbered_lines(path, max_chars):
            if not line.isspace():
                origin = f"{path}, line {number}"
                yield _parse_object(line, origin), origin


def describe_json(path: Path, head: bytes) -> str | None:
    """What a text file looks like if it begins with JSON objects, one a line or in an array; None if it does not.

    Args:
        head: the first bytes of its content.
    """
    if not head.removeprefix(BOM).lstrip().startswith((b"[", b"{")):
        return None
    with open_text(path) as file:
        if _ARRAY_OF_OBJECTS.match(file.read(_CHUNK_CHARS)):
            return "a JSON array of objects; rename it to end in .json"
    with open_text(path) as file:
        lines = [file.readline(_PROBED_CHARS) for _ in range(_PROBED_LINES)]
    lines = [line for line in lines if line and not line.isspace()]
    if lines and all(line.lstrip().startswith("{") and _is_object(line) for line in lines):
        return "JSON Lines: its first lines are JSON objects; rename it to end in .jsonl"
    return None


def _first_line(path: Path, max_chars: int) -> str:
    return next((line for _, line in numbered_lines(path, max_chars) if not line.isspace()), "")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        made |= {name: REPEATED for name in made if names.count(name) > 1}
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object, parse_constant=_refuse_constant)


def _parse_object(text: str, origin: str) -> dict[str, Any]:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(origin, error) from None
    if not isinstance(value, dict):
        raise MoelmError(f"{origin} is not a JSON object with columns.")
    return value


def _invalid(origin: str, error: Exception) -> MoelmError:
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    elif isinstance(error, json.JSONDecodeError):
        reason = _reason(error) if "\n" not in error.doc.rstrip() else f"{_reason(error)}, in line {error.lineno}"
    elif "digits" in str(error):
        reason = "a number has more than 4,300 digits"
    else:
        reason = str(error)
    return MoelmError(f"{origin} is not valid JSON: {reason}.")


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at").removesuffix(" starting")


def _read_array(path: Path, max_chars: int) -> Iterator[tuple[dict[str, Any], str]]:
    """The items of an array, one in memory at a time."""
    with open_text(path) as file:
        text = _JsonText(path, file, max_chars)
        text.expect("[")
        number = 0
        while text.peek() != "]":
            if number:
                text.expect(",")
            number += 1
            origin = f"{path}, item {number} in line {text.peek_line()}"
            if text.peek() != "{":
                raise MoelmError(f"{origin} is not a JSON object with columns.")
            yield text.take_object(origin), origin
        text.expect("]")
        if text.peek():
            raise MoelmError(f"{path}, line {text.line}: text follows the end of the JSON array.")


class _JsonText:
    """JSON text that is read in pieces."""

    def __init__(self, path: Path, file: TextIO, max_chars: int) -> None:
        self.path, self.file, self.max_chars = path, file, max_chars
        self.text, self.at, self.line = "", 0, 1

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while (found := _NOT_SPACE.search(self.text, self.at)) is None:
            self._advance(len(self.text))
            if not self._read_more():
                return ""
        self._advance(found.start())
        return found[0]

    def peek_line(self) -> int:
        """The line of the next character that is not white space."""
        self.peek()
        return self.line

    def expect(self, character: str) -> None:
        """Skip a character that must be next."""
        found = self.peek()
        if found != character:
            problem = f"{found!r} is found where {character!r} is expected" if found else "the array has no end"
            raise MoelmError(f"{self.path}, line {self.line} is not valid JSON: {problem}.")
        self._advance(self.at + 1)

    def take_object(self, origin: str) -> dict[str, Any]:
        """The object that begins at the next character."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                if len(self.text) - self.at > self.max_chars:
                    raise too_long(origin, len(self.text) - self.at, self.max_chars, at_least=True) from None
                if not cut or not self._read_more():
                    line = self.line + self.text.count("\n", self.at, error.pos)
                    raise MoelmError(f"{self.path}, line {line} is not valid JSON: {_reason(error)}.") from None
            except (ValueError, RecursionError) as error:
                raise _invalid(origin, error) from None
            else:
                self._advance(end)
                made: dict[str, Any] = value
                return made

    def _advance(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def _read_more(self) -> bool:
        # As much again as is waiting, so that a long object is not scanned too often.
        more = self.file.read(max(_CHUNK_CHARS, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)
