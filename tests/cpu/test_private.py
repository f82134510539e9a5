"""Machine code that others could have written is not loaded: not ours, and not MLX's."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from cpu.conftest import WHERE
from cpu.test_blas import output, packaged

from mlx_starflow.cpu.private import is_private

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="made with g++, on Linux")
root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files to another user")

AVAILABLE = "from mlx_starflow import cpu\nprint(cpu.has_fast_networks())"
FUSED = """
import tempfile
import mlx_starflow, mlx.core as mx
mx.set_default_device(mx.cpu)
mx.eval(mx.compile(lambda x: mx.tanh(x) * x + 3)(mx.ones(3)))
print(tempfile.gettempdir())
"""


def test_what_is_private(tmp_path):
    file = tmp_path / "a"
    file.touch(0o600)
    assert is_private(file) and is_private(tmp_path)
    for mode in (0o620, 0o602):
        file.chmod(mode)
        assert not is_private(file)
    file.chmod(0o600)
    tmp_path.chmod(0o777)
    assert not is_private(file)
    tmp_path.chmod(0o700)
    assert not is_private(tmp_path / "nowhere")


@root
def test_what_is_anothers_is_not_private(tmp_path):
    file = tmp_path / "a"
    file.touch(0o600)
    os.chown(file, 12345, 12345)
    assert not is_private(file)


def spoil(library: Path) -> bytes:
    """A library that would end the program, with its checksum."""
    content = b"no library"
    library.write_bytes(content + hashlib.sha256(content).digest())
    return library.read_bytes()


@pytest.mark.parametrize("how", ["group", "others", "link", pytest.param("owner", marks=root)])
def test_a_library_that_others_could_write_is_built_again(how, compiled, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), **compiled}
    library = Path(output(WHERE, packaged(), **environment).strip())
    assert stat.S_IMODE(library.stat().st_mode) == 0o700 and stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    spoiled = spoil(library)
    if how == "link":
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")
    elif how == "owner":
        os.chown(library, 12345, 12345)
    else:
        library.chmod(0o720 if how == "group" else 0o702)
    assert output(AVAILABLE, packaged(), **environment) == "True\n"
    assert library.read_bytes() != spoiled and not library.is_symlink()


@root
def test_a_folder_of_another_user_is_not_used(compiled, tmp_path):
    folder = tmp_path / "mlx-starflow"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    library = Path(output(WHERE, packaged(), XDG_CACHE_HOME=str(tmp_path), **compiled).strip())
    assert not library.is_relative_to(folder) and list(folder.iterdir()) == []
    assert not library.exists()  # it went with its process


def test_mlx_compiles_into_a_private_folder(tmp_path):
    shared, cache = tmp_path / "tmp", tmp_path / "cache"
    shared.mkdir()
    shared.chmod(0o1777)
    where = output(FUSED, packaged(), XDG_CACHE_HOME=str(cache), TMPDIR=str(shared)).strip()
    assert Path(where) == shared and list(shared.iterdir()) == []
    assert list(cache.glob("mlx-starflow-compiled/mlx/*/cpu/*.so")) != []
    assert is_private(cache / "mlx-starflow-compiled")


def test_a_private_folder_of_temporary_files_is_kept(tmp_path):
    own = tmp_path / "tmp"
    own.mkdir(mode=0o700)
    output(FUSED, packaged(), XDG_CACHE_HOME=str(tmp_path / "cache"), TMPDIR=str(own))
    assert list(own.glob("mlx/*/cpu/*.so")) != [] and not (tmp_path / "cache").exists()


def test_without_a_home_folder(tmp_path):
    code = "import os\nos.environ.pop('HOME', 0)\nimport pwd\npwd.getpwuid = lambda uid: {}[uid]\n"
    environment = {"XDG_CACHE_HOME": ""}
    assert output(code + AVAILABLE, packaged(), **environment) == "False\n"
    hub = "from mlx_starflow.model_dir.hub import find_model\nfind_model('~/model')"
    message = "\ntry:\n    find_model('~/model')\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    text = output(code + hub.partition("\n")[0] + message, packaged(), **environment)
    assert text.startswith("StarflowError ~/model: the user has no home folder here")
