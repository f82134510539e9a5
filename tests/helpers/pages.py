"""What README, CONTRIBUTING and docs tell a reader to type."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^\n((?: {4}.*\n)+)", re.MULTILINE)
INLINE = re.compile(r"`((?:mlx-starflow|python examples/)[^`\n]* [^`\n]*)`")


@dataclass(frozen=True)
class Words:
    """A command as a shell splits it; `whole` if it is to be typed as it stands, and no mention in a sentence."""

    page: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def python_blocks(page: Path) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language == "python"]


def commands(text: str, name: str) -> list[Words]:
    """The commands in a page of Markdown."""
    fences = [block for language, block in FENCE.findall(text) if language in ("sh", "bash", "zsh")]
    prose = FENCE.sub("", text)
    found = []
    for block in (*fences, *map(textwrap.dedent, INDENTED.findall(prose))):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            found += [Words(name, words, True) for words in split(line)]
    for inline in INLINE.findall(prose):
        found += [Words(name, words, False) for words in split(inline)]
    return found


def split(line: str) -> list[tuple[str, ...]]:
    """The commands of a line: what is between `&&` and `|`, without comments; none if it is no shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # output of a program, which has an apostrophe
        return []
    parts: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("&|;<>"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [tuple(part) for part in parts if part]


def arguments(words: tuple[str, ...]) -> list[str] | None:
    """What `mlx-starflow` is told, wherever it stands in the command; None if the command does not run it."""
    for index, word in enumerate(words):
        if word.rpartition("/")[2] == "mlx-starflow" and "install" not in words[:index]:
            return list(words[index + 1 :])
        if index and words[index - 1] == "-m" and word == "mlx_starflow":
            return list(words[index + 1 :])
    return None
