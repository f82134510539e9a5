"""Models that are loaded on demand, and let go of."""

from __future__ import annotations

import time

import pytest
from helpers.commands import message

from mlx_starflow.server.models import Models
from mlx_starflow.server.refusals import Refusal


@pytest.fixture
def names(directories):
    return [str(path) for path in directories.values()]


def loaded(models: Models) -> list[str]:
    return [about["id"] for about in models.describe() if about["loaded"]]


def test_the_first_is_loaded_and_others_when_they_are_asked_for(names):
    models = Models(names)
    models.open()
    assert loaded(models) == ["pictures"] and models.default == "pictures"
    assert models.get("labels").name == names[1]
    assert loaded(models) == ["pictures", "labels"]
    assert models.get(None) is models.get("pictures")
    with pytest.raises(Refusal, match="there is no model 'demo' here: pictures, labels, movies"):
        models.get("demo")


def test_the_least_recently_used_makes_room(names):
    models = Models(names)
    models.open()
    held = {id: models.find(id).held for id in ("pictures", "labels", "movies")}
    assert all(held.values())
    models.get("labels")
    models.memory = held["pictures"] + held["movies"] + held["labels"] // 2
    models.get("pictures")
    models.get("movies")
    assert loaded(models) == ["pictures", "movies"]
    models.memory = 1
    models.get("labels")  # whatever the plan says, the one that is asked for is tried
    assert loaded(models) == ["labels"]


def test_what_nobody_uses_is_let_go_of(names):
    models = Models(names, keep_alive=0.05)
    models.open()
    models.rest()
    assert loaded(models) == ["pictures"]
    time.sleep(0.1)
    models.rest()
    assert loaded(models) == []
    assert models.get(None).name == names[0]


def test_sizes_follow_from_the_memory_plan(names):
    models = Models(names, memory=50_000_000)
    models.open()
    model = models.find("pictures")
    models.get("pictures")
    models.check_room(model, (8, 8), 1, True, None)
    assert "would take" in message(models.check_room, model, (512, 512), 8, True, None)


def test_two_of_one_name(names):
    models = Models([names[0], names[0] + "/"])
    assert "two models are called pictures" in message(models.open)
