"""Students of a server's models, and what enlarges its pictures."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.commands import message
from helpers.servers import Running
from helpers.students import write_student
from helpers.upscalers import rrdb_tensors, srvgg_tensors, write_upscaler
from PIL import Image

from mlx_starflow.cli import main
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.model_dir.adapters import OF, STUDENT
from mlx_starflow.model_dir.directory import load_student
from mlx_starflow.server.gallery import Gallery
from mlx_starflow.server.models import Models
from mlx_starflow.server.refusals import Refusal
from mlx_starflow.server.service import Service
from mlx_starflow.training.finetuning.adapters import AdapterConfig, adapter_layers, attach, save_adapter


@pytest.fixture(scope="module")
def students(directories, tmp_path_factory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("students"), directories["pictures"]
    return {
        "quick": write_student(folder / "quick", model, guidance=1.0, temperature=0.5),
        "velocity": write_student(folder / "velocity", model, "matching", guidance=1.0),
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_upscaler(tmp_path_factory.mktemp("weights") / "x4.pth", srvgg_tensors())


@pytest.fixture(scope="module")
def equipped(directories, students, weights, tmp_path_factory) -> Iterator[Running]:
    """A server with students and an upscaler."""
    models = Models([str(path) for path in directories.values()], students=list(students.values()), upscaler=weights)
    running = Running(Service(models, Gallery(tmp_path_factory.mktemp("gallery"))))
    yield running
    running.close()


def image(server: Running, picture: dict) -> Image.Image:
    return Image.open(io.BytesIO(server.client.get(picture["url"]).content))


def command(*words: object) -> None:
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output


def test_what_there_is_is_told(equipped, server):
    told = {each["id"]: each["students"] for each in equipped.client.get("/api/models").json()["models"]}
    assert told["labels"] == told["movies"] == []
    quick = {"id": "quick", "kind": "inverse", "steps": 1, "guidance": 1.0, "temperature": 0.5}
    assert told["pictures"] == [quick, quick | {"id": "velocity", "kind": "matching", "steps": 4, "temperature": 1.0}]
    assert equipped.client.get("/api/server").json()["upscale"] == [2, 4]
    assert server.client.get("/api/server").json()["upscale"] == []
    properties = equipped.client.get("/openapi.json").json()["paths"]["/api/generate"]["post"]["requestBody"][
        "content"
    ]["application/json"]["schema"]["properties"]
    assert {"student", "steps", "upscale", "keep"} <= set(properties)


def test_a_student_makes_what_the_command_makes(equipped, directories, students, tmp_path):
    answer = equipped.post("/api/generate", prompt="a cat", seed=7, student="quick", steps=2)
    result = answer.json()["result"]
    assert result["stats"]["student_evaluations"] == 2 and result["pictures"][0]["certificate"] is None
    settings = result["pictures"][0]["metadata"]["settings"]
    assert settings["student"] == str(students["quick"]) and settings["steps"] == 2 and settings["temperature"] == 0.5
    out = tmp_path / "out.png"
    command(
        *("generate", "a cat", "-m", directories["pictures"], "--seed", 7, "-o", out),
        *("--student", students["quick"], "--steps", 2),
    )
    assert equipped.client.get(result["pictures"][0]["url"]).content == out.read_bytes()


def test_drafts_are_exact(equipped):
    exact, drafted = (
        equipped.post("/api/generate", prompt="a cat", seed=7, **own).json()["result"]
        for own in ({"method": "sequential"}, {"method": "draft", "student": "quick"})
    )
    assert drafted["settings"]["method"] == "draft" and drafted["pictures"][0]["certificate"]["max"] < 1e-2
    assert drafted["stats"]["student_evaluations"] == 1
    first, second = (np.array(image(equipped, each["pictures"][0]), int) for each in (exact, drafted))
    assert abs(first - second).max() <= 2


def test_openai_clients_ask_for_a_student_too(equipped):
    asked = {"prompt": "a cat", "seed": 7, "student": "quick", "upscale": 2}
    answer = equipped.post("/v1/images/generations", **asked).json()
    made = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert made.size == (16, 16) and answer["size"] == "16x16"


def test_pictures_that_nobody_keeps(equipped):
    before = len(equipped.service.gallery)
    answer = equipped.post("/api/generate", prompt="a cat", seed=7, student="quick", keep=False).json()
    assert answer["job"]["kind"] == "preview" and len(equipped.service.gallery) == before
    loose = answer["result"]["pictures"][0]
    assert loose["id"] is None and (loose["width"], loose["height"]) == (8, 8)
    kept = equipped.post("/api/generate", prompt="a cat", seed=7, student="quick").json()["result"]["pictures"][0]
    assert base64.b64decode(loose["url"].partition(",")[2]) == equipped.client.get(kept["url"]).content
    assert loose["metadata"] == kept["metadata"]


@pytest.mark.parametrize(
    ("values", "status", "said"),
    [
        ({"student": "../quick"}, 404, "pictures has no student '../quick' here: quick, velocity"),
        ({"student": "quick", "model": "labels"}, 404, "labels has no student 'quick' here: it has none"),
        ({"method": "draft"}, 400, "drafts are a student's"),
        ({"student": "velocity", "method": "draft"}, 400, "drafts need an inverse one"),
        ({"student": "quick", "verify": True}, 400, "leave verify out"),
        ({"student": "quick", "guidance": 3.0}, 400, "knows no other"),
        ({"student": "quick", "steps": 0}, 400, "steps: input should be greater than or equal to 1"),
        ({"steps": 2}, 400, "leave them out"),
        ({"upscale": 3}, 400, "upscale: input should be a multiple of 2"),
        ({"upscale": "2"}, 400, "upscale: input should be a valid integer"),
    ],
)
def test_what_does_not_go(equipped, values, status, said):
    answer = equipped.post("/api/generate", **{"prompt": "a cat", **values})
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"] and "\n" not in answer.json()["error"]["message"]


def test_pictures_are_enlarged_as_by_the_command(equipped, directories, weights, tmp_path):
    for scale in (2, 4):
        picture = equipped.post("/api/generate", prompt="a cat", seed=7, upscale=scale).json()["result"]["pictures"][0]
        out = tmp_path / f"{scale}.png"
        command(
            *("generate", "a cat", "-m", directories["pictures"], "--seed", 7, "-o", out),
            *("--upscale", scale, "--upscale-model", weights),
        )
        assert equipped.client.get(picture["url"]).content == out.read_bytes()
        assert (picture["width"], picture["height"]) == (8 * scale, 8 * scale)
        assert read_metadata(out)["upscaled"][0]["scale"] == scale


def test_edits_and_videos_are_enlarged(equipped):
    picture = equipped.post("/api/generate", prompt="a cat", seed=7).json()["result"]["pictures"][0]["id"]
    answer = equipped.client.post("/api/vary", files={"x": ("", b"")}, data={"image": picture, "upscale": "4"})
    assert answer.status_code == 400  # no such field as x
    answer = equipped.client.post("/api/vary", files={"image": ("a.png", image_bytes())}, data={"upscale": "4"})
    varied = answer.json()["result"]["pictures"][0]
    assert (varied["width"], varied["height"]) == (32, 32) and varied["metadata"]["upscaled"][0]["scale"] == 4
    painted = equipped.post("/api/inpaint", image=picture, rectangle="2,2,4,4", steps=1, rounds=1, upscale=2)
    assert painted.json()["result"]["pictures"][0]["width"] == 16
    video = equipped.post("/api/video", prompt="waves", seed=1, model="movies", frames=5, upscale=2).json()["result"]
    assert video["frames"] == 5 and video["pictures"][0]["metadata"]["upscaled"][0]["scale"] == 2
    plain = equipped.post("/api/video", prompt="waves", seed=1, model="movies", frames=5).json()["result"]
    sizes = [[each["pictures"][0][side] for side in ("width", "height")] for each in (video, plain)]
    assert sizes[0] == [2 * side for side in sizes[1]]


def image_bytes() -> bytes:
    target = io.BytesIO()
    Image.radial_gradient("L").resize((8, 8)).convert("RGB").save(target, "PNG")
    return target.getvalue()


def test_without_an_upscaler_nothing_is_enlarged(server):
    for path, values in (
        ("generate", {"prompt": "a cat"}),
        ("vary", {"image": base64.b64encode(image_bytes()).decode()}),
    ):
        error = server.post(f"/api/{path}", **values, upscale=2).json()["error"]
        assert error["message"] == (
            "upscale: this server enlarges no pictures: leave upscale out, or start it with --upscaler FILE"
        )
        assert error["param"] == "upscale"


def test_one_that_enlarges_twice_and_no_more(directories, tmp_path):
    file = write_upscaler(tmp_path / "x2.pth", rrdb_tensors(unshuffle=2, blocks=1))
    models = Models([str(directories["pictures"])], upscaler=file)
    assert models.upscaling.scales == (2,)
    models.open()
    model = models.find(None)
    with pytest.raises(Refusal, match="this server enlarges by 2, not by 4"):
        models.upscaler(model, 4, (8, 8))
    upscaler = models.upscaler(model, 2, (8, 8))
    assert models.upscaler(model, 2, (8, 8)) is upscaler
    models.memory = upscaler.memory((8, 8)) - 1
    assert "to enlarge 8x8 by 2 would take" in message(models.upscaler, model, 2, (8, 8))
    models.memory, models.keep_alive = 1 << 40, 0.0
    models.rest()
    assert models.upscaler(model, 2, (8, 8)) is not upscaler


def test_students_that_cannot_be_offered(directories, students, tmp_path):
    names = [str(directories["labels"])]
    assert "nowhere is not a folder; give a student" in message(Models, names, students=[tmp_path / "nowhere"])
    assert "is no student" in message(Models, names, students=names)
    stranger = Models(names, students=[students["quick"]])
    assert "has learned from none of the models here: give its teacher with --model" in message(stranger.open)
    other = write_student(tmp_path / "quick", directories["pictures"])
    twice = Models([str(directories["pictures"])], students=[students["quick"], other])
    assert "two students are called quick" in message(twice.open)
    assert f"there is no file {tmp_path / 'no.pth'}" in message(Models, names, upscaler=tmp_path / "no.pth")


def test_a_models_own_student_is_offered(directories, students, tmp_path):
    model = Path(shutil.copytree(directories["pictures"], tmp_path / "model"))
    write_student(model / "student", model)
    for given, ids in (((), ["student"]), ((model,), ["student"]), ((students["quick"],), ["student", "quick"])):
        models = Models([str(model)], students=given)
        models.open()
        assert [each["id"] for each in models.describe()[0]["students"]] == ids
    made, named = (
        np.array(models.get(None).generate("a cat", seed=3, student=student).latents)
        for student in (models.student(models.find(None), "student"), model / "student")
    )
    assert np.array_equal(made, named)
    write_student(model / "student", model, teacher="others")  # of what the weights were before they were trained on
    models = Models([str(model)])
    models.open()
    assert models.describe()[0]["students"] == []


def test_a_students_weights_are_counted(directories, students):
    plain, taught = (
        Models([str(directories["pictures"])]),
        Models([str(directories["pictures"])], students=[students["quick"]]),
    )
    plain.open()
    taught.open()
    held = sum(path.stat().st_size for path in students["quick"].glob("*.safetensors"))
    assert taught.find(None).held - plain.find(None).held == pytest.approx(held, rel=0.2)


def test_adapters_of_students(directories, students, tmp_path):
    student = load_student(students["quick"])
    attach(student, AdapterConfig(rank=2))
    for layer in adapter_layers(student).values():
        layer.lora_b = mx.ones_like(layer.lora_b)
    folder = save_adapter(tmp_path / "style", student, AdapterConfig(rank=2), {OF: STUDENT})
    names = [str(directories["pictures"])]
    assert "give that with --student DIR" in message(Models, names, adapters=[(folder, 1.0)])
    models, plain = Models(names, students=[students["quick"]], adapters=[(folder, 1.0)]), Models(names)
    models.open()
    plain.open()
    made, without = (
        np.array(each.get(None).generate("a cat", seed=3, student=students["quick"]).latents)
        for each in (models, plain)
    )
    assert not np.allclose(made, without)
    exact = [np.array(each.get(None).generate("a cat", seed=3).latents) for each in (models, plain)]
    assert np.allclose(*exact, atol=1e-5)
