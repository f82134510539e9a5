"""What would be published: wheel and sdist hold what they should, and a fresh installation makes the README's picture.

Run with -m release; the extra "release" brings the tools.
"""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from helpers.paths import ROOT

from mlx_starflow import __version__
from mlx_starflow.cli import main

PICTURE = ["generate", "a fox to the left of a cactus at night", "--seed", "7", "-o"]


def run(command: list[object], folder: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked(*folders: str) -> set[str]:
    return set(run(["git", "ls-files", *folders], ROOT).split())


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a fresh clone and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    for name in tracked():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    run([sys.executable, "-m", "build", "--outdir", folder / "dist", source], folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_there_is_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == __version__
    assert f"mlx_starflow-{__version__}-py3-none-any.whl" in (ROOT / "docs/quickstart.md").read_text()


@pytest.mark.release
def test_twine_is_content(dist):
    run([sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()], dist)


@pytest.mark.release
def test_the_wheel_is_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = tracked("mlx_starflow") | {f"mlx_starflow/{name}" for name in tracked("convert")}
    assert names == package
    assert {
        "mlx_starflow/py.typed",
        "mlx_starflow/demo/model/model.safetensors",
        "mlx_starflow/cpu/network.cpp",
    } < names
    assert f"It has {wheel.stat().st_size / 1e6:.0f} MB" in (ROOT / "docs/quickstart.md").read_text()


@pytest.mark.release
def test_its_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = f"mlx_starflow-{__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        for licence in ("LICENSE", "mlx_starflow/demo/model/NOTICE"):
            assert archive.read(f"{info}/licenses/{licence}") == (ROOT / licence).read_bytes()
    assert metadata["Version"] == __version__
    text = metadata.get_payload()
    assert isinstance(text, str)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links and all(link.startswith("https:") for link in links)


@pytest.mark.release
def test_the_sdist_has_no_tests(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "setup.py", "convert/flow.py"} < names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "examples/", ".ci"))]


@pytest.mark.release
def test_a_fresh_installation_makes_the_picture_of_the_readme(wheel, tmp_path):
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh/bin/python"
    run([python, "-m", "pip", "install", "--quiet", wheel], tmp_path)
    run([python, "-m", "pip", "check"], tmp_path)
    run([tmp_path / "fresh/bin/mlx-starflow", *PICTURE, "fox.png"], tmp_path)
    where = run([python, "-c", "import mlx_starflow.convert as c; print(c.__file__)"], tmp_path)
    assert Path(where).is_relative_to(tmp_path)
    ours = CliRunner().invoke(main, [*PICTURE, str(tmp_path / "ours.png")])
    assert ours.exit_code == 0, ours.output
    assert (tmp_path / "fox.png").read_bytes() == (tmp_path / "ours.png").read_bytes()
