"""The elements of a large JSON file's lists with the bytes at which they lie, so that it is parsed once."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator, Iterator
from typing import Any, NamedTuple

SPACE = re.compile(r"[ \t\n\r]*")


class Element(NamedTuple):
    """One element of a list at the top of the file, or another value there.

    Attributes:
        name: the list's.
        start, length: its bytes in the file.
        value: it, parsed; text outside ASCII is not decoded in it.
    """

    name: str
    start: int
    length: int
    value: Any


def elements(data: bytes, wanted: Collection[str]) -> Iterator[Element]:
    """The elements of the `wanted` lists of a JSON object, in order, one parsed at a time.

    Raises:
        ValueError: it is no JSON object, or breaks off; the message says at which byte.
    """
    text = data.decode(
        "latin-1"
    )  # of one byte a character, so that places in it are places in the file
    place = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    decoder = json.JSONDecoder()
    place = _expect(text, place, "{")
    if _next(text, place)[0] == "}":
        return
    while True:
        name, place = _decode(decoder, text, _next(text, place)[1])
        place = _expect(text, place, ":")
        char, place = _next(text, place)
        if char == "[" and name in wanted:
            place = yield from _list(decoder, text, place + 1, name)
        else:
            _, place = _decode(decoder, text, place)
        char, place = _next(text, place)
        if char == "}":
            return
        place = _expect(text, place, ",")


def _list(
    decoder: json.JSONDecoder, text: str, place: int, name: str
) -> Generator[Element, None, int]:
    """Gives out a list's elements; returns the place behind it."""
    char, place = _next(text, place)
    if char == "]":
        return place + 1
    while True:
        value, end = _decode(decoder, text, place)
        yield Element(name, place, end - place, value)
        char, place = _next(text, end)
        if char == "]":
            return place + 1
        place = _next(text, _expect(text, place, ","))[1]


def _next(text: str, place: int) -> tuple[str, int]:
    """The next character that is no space, and its place."""
    found = SPACE.match(text, place)
    assert found is not None
    return text[found.end() : found.end() + 1], found.end()


def _expect(text: str, place: int, wanted: str) -> int:
    char, place = _next(text, place)
    if char != wanted:
        raise ValueError(
            f"it is no JSON object: expected {wanted!r} at byte {place}, got {char or 'the end'!r}"
        )
    return place + 1


def _decode(decoder: json.JSONDecoder, text: str, place: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, place)
    except (ValueError, StopIteration, RecursionError) as error:
        raise ValueError(f"its JSON does not parse near byte {place}: {error}") from None
