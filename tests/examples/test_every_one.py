"""Every script of examples/ has a test."""

from __future__ import annotations

import re

import pytest
from helpers.paths import EXAMPLES, TESTS

SCRIPTS = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("**/*.py"))
SOURCES = "\n".join(path.read_text() for path in sorted(TESTS.glob("**/test_*.py")) if path.name != "test_every_one.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_is_run_or_imported(script):
    module = re.escape(script.rpartition("/")[2].removesuffix(".py"))
    imported = re.search(rf"^ *(import {module}\b|from {module} import)", SOURCES, re.MULTILINE)
    neighbours = [path.read_text() for path in (EXAMPLES / script).parent.glob("*.py")]
    helps = any(re.search(rf"^(import {module}\b|from {module} import)", text, re.MULTILINE) for text in neighbours)
    assert f'"{script}"' in SOURCES or imported or helps, f"no test runs examples/{script}"


def test_reports_import_nothing_from_tests():
    for path in EXAMPLES.glob("**/*.py"):
        assert not re.search(r'\bhelpers\b|"tests"|conftest', path.read_text()), path
