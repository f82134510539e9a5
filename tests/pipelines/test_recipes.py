"""What a file says about how it was made, when somebody else may have written it."""

from __future__ import annotations

import math
from dataclasses import replace

import huggingface_hub
import pytest
from helpers.commands import message
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from mlx_starflow.media.images import save_image
from mlx_starflow.pipelines.recipes import MOST_PICTURES, Recipe
from mlx_starflow.sampling import SamplingPlan

GOOD = {
    "version": "0.9",
    "model": "demo",
    "prompts": ["a cat", ""],
    "seeds": [1, 2],
    "settings": {"guidance": 1.5, "temperature": 1, "method": "auto", "attn_temp": 1.0, "denoise": True, "size": None},
}
VIDEO = GOOD | {"settings": GOOD["settings"] | {"size": [32, 32], "frames": 17, "fps": 16, "context": None}}


def write(path, metadata):
    save_image(Image.new("RGB", (2, 2)), path, metadata)
    return path


def settings(**changes):
    return {"settings": GOOD["settings"] | changes}


def test_a_recipe_comes_back(tmp_path):
    more = {"adapters": [["run/adapter", 0.5]], "columns": 3, "certificate": {"max": 1e-5, "rms": 1e-6}}
    recipe = Recipe.read(write(tmp_path / "a.jpg", GOOD | more))
    assert (recipe.model, recipe.prompts, recipe.seeds) == ("demo", ["a cat", ""], [1, 2])
    assert recipe.adapters == (("run/adapter", 0.5),) and recipe.columns == 3
    assert recipe.settings == GOOD["settings"] and recipe.given_seeds == [1, 2]
    # "auto" was one token after another where there was no plan.
    assert recipe.settings_with(SamplingPlan((), 1.0, {}), ["rolling"]) == recipe.settings
    assert recipe.settings_with(None, ["rolling"]) == recipe.settings | {"method": "sequential"}
    rolling = replace(recipe, settings={"method": "rolling"})
    assert rolling.settings_with(None, ["rolling"]) == rolling.settings
    assert rolling.settings_with(None, ["jacobi"]) == {"method": "sequential"}
    found = Recipe.read(write(tmp_path / "a.webp", VIDEO | {"source": {"image": None}}), video=True)
    assert found.source == {"image": None} and found.settings["frames"] == 17


@pytest.mark.parametrize(
    "changes",
    [
        {"model": 3},
        {"model": ""},
        {"model": "a\n" + "b"},
        {"model": "a" * 5000},
        {"adapters": "run"},
        {"adapters": [["run", "1"]]},
        {"adapters": [["run", math.nan]]},
        {"adapters": [["run", 1.0]] * 1000},
        {"prompts": "a cat"},
        {"prompts": []},
        {"prompts": ["a" * 100_000]},
        {"prompts": ["a cat"] * (MOST_PICTURES + 1)},
        {"seeds": []},
        {"seeds": 3},
        {"seeds": [-1]},
        {"seeds": [1.5]},
        {"seeds": [True]},
        {"seeds": [10**100]},
        {"seeds": [0] * (MOST_PICTURES + 1)},
        {"settings": []},
        settings(guidance=math.inf),
        settings(guidance=-1),
        settings(guidance="1"),
        settings(guidance=10**400),
        settings(temperature=math.nan),
        settings(method="magic"),
        settings(method=["auto"]),
        settings(attn_temp=0),
        settings(denoise=1),
        settings(size=[64]),
        settings(size=[64, 1e9]),
        settings(size=[0, 64]),
        settings(size="64x64"),
        {"columns": 0},
        {"columns": 10**9},
        {"noise_sha256": "../x"},
    ],
)
def test_out_of_bounds(tmp_path, changes):
    path = write(tmp_path / "a.png", GOOD | changes)
    line = message(Recipe.read, path)
    assert f"{path}: its description is damaged, or out of bounds: " in line and len(line) < 300


@pytest.mark.parametrize("changes", [{"frames": 10**9}, {"fps": 0}, {"fps": 10**6}, {"context": -1}, {"frames": "9"}])
def test_videos_out_of_bounds(tmp_path, changes):
    path = write(tmp_path / "a.png", VIDEO | {"settings": VIDEO["settings"] | changes})
    assert "out of bounds" in message(Recipe.read, path, video=True)


def test_what_does_not_go_together(tmp_path):
    many = {"prompts": ["a cat"] * 101, "seeds": list(range(100))}
    assert "more than 10000 pictures" in message(Recipe.read, write(tmp_path / "a.png", GOOD | many))
    assert "neither seeds nor" in message(Recipe.read, write(tmp_path / "b.png", GOOD | {"seeds": [None]}))
    both = {"noise_sha256": "0" * 64}
    assert "neither seeds nor" in message(Recipe.read, write(tmp_path / "c.png", GOOD | both))
    assert "unknown setting 'paces'" in message(Recipe.read, write(tmp_path / "d.png", GOOD | settings(paces=4)))
    assert "lacks seeds, settings" in message(
        Recipe.read, write(tmp_path / "e.png", {"model": "demo", "prompts": ["a cat"]})
    )


def test_names_stand_for_what_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path))
    asked = []

    def snapshot_download(repository, **options):
        asked.append(options.get("local_files_only"))
        if repository == "some/body":
            raise LocalEntryNotFoundError(repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    line = message(Recipe.read(write(tmp_path / "a.png", GOOD | {"model": "some/body"})).check_local)
    assert "some/body is not on this machine" in line and line.endswith("--model some/body")
    Recipe.read(write(tmp_path / "b.png", GOOD | {"model": "my/own"})).check_local()
    assert asked == [True, True]
    adapted = Recipe.read(write(tmp_path / "c.png", GOOD | {"adapters": [["run/adapter", 0.5]]}))
    assert message(adapted.check_local).endswith("give one with --lora PATH 0.5")
    adapted.check_local(adapters=False)
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/adapter_config.json").write_text("{}")
    adapted.check_local()
