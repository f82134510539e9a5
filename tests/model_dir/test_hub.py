"""From a model's name to its directory; no test asks the network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir import hub
from mlx_starflow.model_dir.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter
from mlx_starflow.model_dir.files import CLASSES_FILE
from mlx_starflow.model_dir.hub import converted_directory, fetch, find_model, find_student


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """An empty folder of converted releases."""
    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def download(monkeypatch):
    """Replaces the download by a result or an error; collects what was asked for."""
    asked = []

    def install(outcome: object) -> list:
        def snapshot_download(repository: str, **options: object) -> str:
            asked.append((repository, options))
            if isinstance(outcome, Exception):
                raise outcome
            return str(outcome)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return install


def message(name: str | Path) -> str:
    with pytest.raises(StarflowError) as error:
        find_model(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "DEMO", tmp_path)
    assert "demo model is not in this installation" in message("demo")
    (tmp_path / "config.json").write_text("{}")
    assert find_model("demo") == tmp_path


def test_the_demo_is_in_the_package():
    assert hub.DEMO.parent == Path(hub.__file__).parents[1] / "demo"


def test_folder(tmp_path, monkeypatch):
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert find_model("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/owner") == tmp_path / "owner"


def test_students_of_models(tmp_path, monkeypatch, download):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "fetched/student/config.json"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    for name in ("fetched", tmp_path / "fetched", "fetched/student"):
        assert find_student(name).resolve() == own.parent, name
    assert find_student("demo") == hub.DEMO / "student"
    asked = download(tmp_path / "fetched")
    assert find_student("owner/name") == find_student(Path("owner/name")) == own.parent
    assert all(options["local_files_only"] for _, options in asked)
    download(LocalEntryNotFoundError("not here"))
    assert find_student("owner/name") == Path("owner/name")
    assert find_student("nowhere") == Path("nowhere")


def test_file(tmp_path):
    (tmp_path / "model.pth").write_text("")
    assert "convert it first: mlx-starflow convert flow" in message(tmp_path / "model.pth")
    (tmp_path / "config.json").write_text("")
    assert "give the folder of a model" in message(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "name", ["demmo", "", "./nowhere", "../a/b", "a/b/c", "/no/where", "https://host/a/b", "a b/c"]
)
def test_unknown(name, download):
    asked = download(AssertionError("must not download"))
    text = message(name)
    assert text.startswith(f"unknown model {name!r}: give demo, the folder of a model, or a Hugging Face repository")
    assert not asked


def test_a_path_object_is_never_a_repository(download):
    asked = download(AssertionError("must not download"))
    assert "unknown model 'owner/name'" in message(Path("owner/name"))
    assert not asked


def test_official_checkpoints_need_converting(download, cache):
    asked = download(AssertionError("must not download"))
    assert "download and convert them once with: mlx-starflow convert apple/starflow" in message("apple/starflow")
    assert "once with: mlx-starflow convert apple/starflow-v (" in message("apple/starflow-v")
    (cache / "apple--starflow/vae").mkdir(parents=True)  # as a run that was interrupted leaves it
    (cache / "apple--starflow/vae/config.json").write_text("{}")
    assert "mlx-starflow convert Apple/STARFlow" in message("Apple/STARFlow")
    assert not asked


@pytest.mark.parametrize("name", ["apple/starflow", "Apple/STARFlow", "owner/other"])
def test_converted_releases_are_found(name, download, cache):
    asked = download(AssertionError("must not download"))
    directory = cache / name.lower().replace("/", "--")
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    assert find_model(name) == directory == converted_directory(name)
    assert not asked


def test_where_converted_releases_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", None, "~/.cache/mlx-starflow"):
        monkeypatch.delenv("MLX_STARFLOW_CACHE", raising=False)
        if value is not None:
            monkeypatch.setenv("MLX_STARFLOW_CACHE", value)
        assert converted_directory("Apple/STARFlow") == tmp_path / ".cache/mlx-starflow/apple--starflow"
    monkeypatch.setenv("MLX_STARFLOW_CACHE", "/models")
    assert converted_directory("apple/starflow") == Path("/models/apple--starflow")


def test_fetch_a_commit(download, tmp_path):
    asked = download(tmp_path)
    assert fetch("owner/name", ["a", "b*"], revision="abc") == tmp_path
    assert asked == [("owner/name", {"allow_patterns": ["a", "b*"], "revision": "abc"})]
    download(OSError(28, "No space left on device"))
    with pytest.raises(StarflowError, match=r"^cannot download owner/name: .*No space left.*try again"):
        fetch("owner/name", [])


def test_repository(download, tmp_path):
    asked = download(tmp_path)
    assert find_model("owner/some-model_1.0") == tmp_path
    ((repository, options),) = asked
    assert repository == "owner/some-model_1.0"
    wanted = ["*.json", "*.safetensors", "*spiece.model", CLASSES_FILE, "LICEN[CS]E*", "NOTICE*"]
    assert options == {"allow_patterns": wanted}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("no\nsnapshot"), "the Hub cannot be reached"),
        (ConnectionError("name resolution\nfailed"), "name resolution"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("Repo id must be\nsomething else"), "Repo id must be"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_download_errors(error, reason, download):
    download(error)
    text = message("owner/name")
    assert text.startswith("cannot download owner/name")
    assert reason in text


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "the Hub cannot be reached" in message("owner/no-such-model")


def test_what_is_fetched_of_an_adapter(download, tmp_path):
    asked = download(tmp_path)
    mx.save_safetensors(str(tmp_path / WEIGHTS_FILE), {"x.lora_a": mx.zeros((2, 1)), "x.lora_b": mx.zeros((1, 2))})
    (tmp_path / CONFIG_FILE).write_text('{"kind": "lora", "scale": 2.0}')
    assert list(Adapter.read("jane/adapter").layers) == ["x"]
    assert asked == [("jane/adapter", {"allow_patterns": [CONFIG_FILE, WEIGHTS_FILE]})]
    with pytest.raises(StarflowError, match="is not a folder"):
        Adapter.read(tmp_path / "none")
    assert len(asked) == 1
