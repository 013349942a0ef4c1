"""Texts of strangers (models, data, files of others) as they may stand on a terminal or a page.

A terminal obeys what it is sent: an escape sequence in an answer would wipe the screen or set its title,
and a change of direction would turn a sentence round. Here such characters become pictures of themselves.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rlhf_cli.secret import masked

_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters without a picture that turn the direction of what follows."""
_SURROGATES = range(0xD800, 0xE000)
"""Halves of characters, which no file and no terminal takes."""
_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) != "\n"},
    **dict.fromkeys(range(127, 160), "\u2421"),
    **{ord(c): f"\u27e8U+{ord(c):04X}\u27e9" for c in _DIRECTIONS},
    **dict.fromkeys(_SURROGATES, "\ufffd"),
}
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that a spreadsheet computes."""
_ESCAPES = {
    code: f"\\u{code:04x}" for code in (*range(127, 160), *map(ord, _DIRECTIONS), *_SURROGATES)
}


def visible(text: str) -> str:
    """The text with control characters and changes of direction shown as such; newlines stay."""
    return text.translate(_PICTURES)


def told(sentence: str) -> str:
    """A sentence for the terminal: what servers, files and models had to say in it only shown, no secret."""
    return masked(visible(sentence))


def on_one_line(text: str) -> str:
    """The same with a picture for a newline too."""
    return visible(text).replace("\n", "\u23ce")


def file_name(text: str) -> str:
    """A text as the name of a file in the folder it is meant for, and in no other."""
    return re.sub(r"[^\w.+=@-]+", "_", text).lstrip(".")


def in_markdown(text: str) -> str:
    """A text within a line of Markdown: it opens no tag, no link and no cell."""
    line = " ".join(visible(text).split("\n"))
    return line.replace("<", "&lt;").replace("[", r"\[").replace("|", r"\|")


def as_code(text: str) -> str:
    """A text as Markdown's code, whatever backticks are in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    inside = " ".join(visible(text).split("\n"))
    return f"{fence} {inside} {fence}" if "`" in text else f"{fence}{inside}{fence}"


def in_cell(value: Any) -> Any:
    """A value for csv: of text, nothing that a spreadsheet would take for a formula."""
    if not isinstance(value, str):
        return value
    return visible(f"'{value}" if value.startswith(_FORMULAS) else value)


def as_json(value: Any) -> str:
    """JSON to be read by people as well: nothing in it steers a terminal, and it says the same."""
    return json.dumps(value, indent=2, ensure_ascii=False).translate(_ESCAPES)
