"""Emoji as pictures, with their names: npm packages, fetched with `npm pack`.

The pictures are Microsoft's Fluent emoji in 3-D style (MIT licence, Copyright (c) Microsoft Corporation), the names
emojibase's (MIT licence, Copyright (c) Miles Johnson).
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES = "emojibase-data@17.0.0"

# Groups and subgroups of emojibase whose pictures mean little as pictures, or show people.
LEFT_OUT_GROUPS = {"people-body", "flags", "symbols", "component"}
LEFT_OUT_SUBGROUPS = {"time", "alphanum", "arrow"}
KEPT_SUBGROUPS = {"geometric"}


def fetch(package: str, into: Path) -> Path:
    """Download and unpack one npm package; returns its folder."""
    print(f"fetching {package}")
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=into, check=True, capture_output=True, text=True)
    archive = into / done.stdout.strip().splitlines()[-1]
    folder = into / archive.stem
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def labels(names: Path, pictures: set[str]) -> dict[str, str]:
    """emojibase's label, in lower case -> the stem of its picture's file, of everything that is a thing."""
    data = json.loads((names / "en/data.json").read_text())
    messages = json.loads((names / "en/messages.json").read_text())
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
    found = {}
    for entry in data:
        group, subgroup = groups.get(entry.get("group")), subgroups.get(entry.get("subgroup"))
        if group is None or subgroup in LEFT_OUT_SUBGROUPS:
            continue
        if group in LEFT_OUT_GROUPS and subgroup not in KEPT_SUBGROUPS:
            continue
        code = entry["hexcode"].lower()
        stem = next((s for s in (code, code.replace("-fe0f", ""), code + "-fe0f") if s in pictures), None)
        if stem is not None:
            found[entry["label"].lower()] = stem
    return found
