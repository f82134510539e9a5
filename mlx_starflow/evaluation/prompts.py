"""Lists of prompts: GenEval's, HPSv2's, and one a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import parse_json, read_lines, read_text

MOST_PROMPTS = 1_000_000


class ListedPrompt(NamedTuple):
    """A prompt, and what kind of prompt it is, "" if the list does not say."""

    text: str
    kind: str = ""


def read_prompts(path: Path) -> list[ListedPrompt]:
    """The prompts of a list.

    Args:
        path: `.jsonl`, an object with "prompt" in each line, as GenEval's, whose "tag" is the kind; `.json`, a list of
            texts or of objects with "prompt", or an object with such a list for each kind, as HPSv2's; any other file
            is one prompt a line.

    Raises:
        StarflowError: it cannot be read, or holds no prompts.
    """
    if path.suffix == ".jsonl":
        found = [_parse_line(line, number, path) for number, line in enumerate(_lines(path), 1) if line.strip()]
    elif path.suffix == ".json":
        try:
            content = parse_json(read_text(path))
        except ValueError as error:
            raise StarflowError(f"{path} is not valid JSON: {one_line(error)}") from None
        kinds = content if isinstance(content, dict) else {"": content}
        found = [_entry(each, str(kind), str(path)) for kind, list_ in kinds.items() for each in _listed(list_, path)]
    else:
        found = [ListedPrompt(line) for line in read_lines(path)]
    if not found or len(found) > MOST_PROMPTS:
        raise StarflowError(f"{path} holds {len(found):,} prompts: give 1 to {MOST_PROMPTS:,}")
    return found


def _lines(path: Path) -> list[str]:
    return read_text(path).split("\n")


def _parse_line(line: str, number: int, path: Path) -> ListedPrompt:
    where = f"{path}, line {number}"
    try:
        return _entry(parse_json(line), "", where)
    except ValueError as error:
        raise StarflowError(f"{where} is not valid JSON: {one_line(error)}") from None


def _listed(content: Any, path: Path) -> list[Any]:
    if not isinstance(content, list):
        raise StarflowError(f"{path}: expected a list of prompts, or one for each kind")
    return content


def _entry(content: Any, kind: str, where: str) -> ListedPrompt:
    if isinstance(content, str):
        return ListedPrompt(content, kind)
    if isinstance(content, dict) and isinstance(content.get("prompt"), str):
        return ListedPrompt(content["prompt"], str(content.get("tag", kind)))
    raise StarflowError(f'{where}: expected a prompt, or an object with "prompt"')
