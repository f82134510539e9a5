"""The documentation builds without a warning, and its reference has every public name; run with -m release."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

import mlx_starflow

pytestmark = pytest.mark.release


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file(), page


def test_the_reference_documents_all_public_names(site: Path) -> None:
    page = (site / "python.html").read_text()
    documented = set(re.findall(r'<h\d id="([\w.]+)" class="doc doc-heading"', page))
    known = {name.rpartition(".")[2] for name in documented}
    assert not {name for name in mlx_starflow.__all__ if not name.startswith("__")} - known
    assert "mlx_starflow.convert.convert_flow" in documented
    # Docstrings' sections are parsed: "Raises:" is a heading of its own, and the exception leads to its text.
    assert '<a class="autorefs autorefs-internal" ' in page and "mlx_starflow.StarflowError" in page
    assert "Raises:" in page and "<p>Raises:" not in page


def test_links_lead_somewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        for link in re.findall(r'href="([^":]+)"', page.read_text()):
            path, _, anchor = html.unescape(link).partition("#")
            target = page.parent / path if path else page
            if page.name == "404.html" or path in (".", ""):
                continue
            assert target.exists(), (page.name, link)
            if anchor and target.suffix == ".html":
                assert f'id="{anchor}"' in target.read_text(), (page.name, link)
