"""The server's own endpoints."""

from __future__ import annotations

import base64
import io
import json

import pytest
from click.testing import CliRunner
from PIL import Image

from mlx_starflow.cli import main


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    target = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert(mode).save(target, "PNG")
    return target.getvalue()


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def events(text: str) -> list[tuple[str, dict]]:
    blocks = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_models_say_what_they_are(server):
    told = server.client.get("/api/models").json()
    assert told["default"] == "pictures"
    kinds = {each["id"]: (each["kind"], each["size"], each["step"]) for each in told["models"]}
    assert kinds["pictures"] == ("images", [8, 8], 2)
    assert kinds["labels"] == ("classes", [8, 8], 0)
    assert kinds["movies"][0] == "videos"


def test_same_seed_same_picture_as_the_command_byte_for_byte(server, directories, tmp_path):
    for model in ("pictures", "labels"):
        out = tmp_path / f"{model}.png"
        done = CliRunner().invoke(main, ["generate", "1", "-m", str(directories[model]), "--seed", "7", "-o", str(out)])
        assert done.exit_code == 0, done.output
        result = server.post("/api/generate", prompt="1", seed=7, model=model).json()["result"]
        assert server.client.get(result["pictures"][0]["url"]).content == out.read_bytes()


def test_several_pictures_have_seeds_that_count_up(server):
    result = server.post("/api/generate", prompt="a cat", seed=3, n=3).json()["result"]
    assert [each["seed"] for each in result["pictures"]] == [3, 4, 5]
    assert [each["metadata"]["seeds"] for each in result["pictures"]] == [[3], [4], [5]]
    assert result["pictures"][0]["certificate"]["max"] < 0.1


def test_the_best_of_several(server):
    result = server.post("/api/generate", prompt="a cat", seed=3, n=2, best_of=3).json()["result"]
    assert all(each["seed"] in range(low, low + 3) for each, low in zip(result["pictures"], (3, 6), strict=True))
    assert all(each["fit"] is not None for each in result["pictures"])
    assert "leave out the best-of" in server.post("/api/generate", prompt="", n=1, best_of=2).text


def test_a_stream_tells_previews_and_pictures(server):
    answer = server.client.post("/api/generate?mode=stream", json={"prompt": "a cat", "seed": 1, "previews": True})
    told = events(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    # Of two blocks, one leaves something unfinished.
    assert [name for name, _ in told if name not in ("progress", "state")] == ["preview", "picture", "done"]
    previews = [data for name, data in told if name == "preview"]
    assert [(each["block"], each["number"]) for each in previews] == [(1, 0)]
    assert previews[0]["image"].startswith("data:image/png;base64,")
    phases = [data["phase"] for name, data in told if name == "progress"]
    assert {"text", "flow", "decode"} <= set(phases)
    # Looking does not change what is seen.
    plain = server.post("/api/generate", prompt="a cat", seed=1).json()["result"]["pictures"][0]
    picture = next(data for name, data in told if name == "picture")
    assert server.client.get(plain["url"]).content == server.client.get(picture["url"]).content


def test_a_job_in_the_background(server):
    answer = server.client.post("/api/generate?mode=background", json={"prompt": "a cat", "seed": 1})
    assert answer.status_code == 202
    id = answer.json()["job"]["id"]
    told = events(server.client.get(f"/api/jobs/{id}/events").text)
    assert told[-1][0] == "done" and told[-1][1]["result"]["pictures"]
    # Whoever comes late is told what there is.
    again = events(server.client.get(f"/api/jobs/{id}/events").text)
    assert [name for name, _ in again] == ["state", "picture", "done"]
    one = server.client.get(f"/api/jobs/{id}").json()
    assert one["job"]["state"] == "done" and one["result"] == told[-1][1]["result"]
    assert id in [each["id"] for each in server.client.get("/api/jobs").json()["jobs"]]
    assert server.client.get("/api/jobs/none").status_code == 404


@pytest.mark.parametrize("model", ["pictures", "labels", "movies"])
def test_score_encode_and_decode(server, model):
    prompt = "1" if model == "labels" else "a cat"
    result = server.post("/api/score", image=b64(png()), prompt=prompt, model=model, draws=2).json()["result"]
    assert result["nll"] == pytest.approx(sum(map(sum, result["surprise"])) / result["dimensions"], rel=1e-5)
    assert result["map"]["low"] <= result["map"]["high"]
    encoded = server.post("/api/encode", image=b64(png()), prompt=prompt, model=model).json()["result"]
    assert encoded["round_trip"]["flow_max"] < 1e-3
    again = server.post("/api/decode", noise=encoded["noise"], model=model).json()["result"]["pictures"]
    assert again[0]["metadata"]["made_by"] == "decode" and again[0]["metadata"]["prompts"] == [prompt]


def test_classes_are_the_labels_unless_others_are_given(server):
    result = server.post("/api/classify", image=b64(png()), model="labels").json()["result"]
    assert list(result["posterior"]) == ["0", "1", "2"]
    assert sum(result["posterior"].values()) == pytest.approx(1)
    result = server.post("/api/classify", image=b64(png()), labels=["a cat", "a dog"]).json()["result"]
    assert result["label"] in ("a cat", "a dog")


def test_edits(server):
    picture = server.post("/api/generate", prompt="a cat", seed=3).json()["result"]["pictures"][0]["id"]
    result = server.post("/api/reprompt", image=picture, source="a cat", target="a dog", strengths=[0, 1.0])
    assert [each["strength"] for each in result.json()["result"]["pictures"]] == [0.0, 1.0]
    result = server.post("/api/vary", image=picture, prompt="a cat", n=2, seed=4).json()["result"]
    assert [each["seed"] for each in result["pictures"]] == [4, 5]
    result = server.post("/api/interpolate", first=picture, second=b64(png()), shares=[0.5]).json()["result"]
    assert result["pictures"][0]["share"] == 0.5
    result = server.post("/api/inpaint", image=picture, rectangle="2,2,4,4", steps=1, rounds=2, n=2, seed=2)
    result = result.json()["result"]
    assert [each["seed"] for each in result["pictures"]] == [2, 3]
    assert result["pictures"][0]["metadata"]["made_by"] == "edit inpaint"
    assert [len(each) for each in result["nll"]] == [3, 3]


def test_a_form_is_as_good_as_json(server):
    files = {"image": ("../../x.png", png())}
    answer = server.client.post("/api/score", files=files, data={"prompt": "a cat", "draws": "2"})
    as_json = server.post("/api/score", image=b64(png()), prompt="a cat", draws=2)
    assert answer.json()["result"] == as_json.json()["result"]
    answer = server.client.post("/api/classify", files=files, data={"labels": "a cat, a dog"})
    assert set(answer.json()["result"]["posterior"]) == {"a cat", "a dog"}


def test_frames_of_a_video_are_told_as_they_come(server):
    answer = server.client.post("/api/video?mode=stream", json={"prompt": "waves", "seed": 1, "model": "movies"})
    told = events(answer.text)
    frames = [data["index"] for name, data in told if name == "frame"]
    assert frames == list(range(17))
    item = told[-1][1]["result"]["pictures"][0]
    assert item["kind"] == "video" and item["url"].endswith(".webp")
    with Image.open(io.BytesIO(server.client.get(item["url"]).content)) as video:
        assert video.n_frames == 17


def test_previews_of_a_video_come_before_its_frames(server):
    asked = {"prompt": "waves", "seed": 1, "model": "movies", "previews": True}
    told = events(server.client.post("/api/video?mode=stream", json=asked).text)
    names = [name for name, _ in told if name in ("preview", "frame")]
    assert names[:2] == ["preview", "preview"] and names.count("preview") == 5
    previews = [data for name, data in told if name == "preview"]
    assert [(each["latent_frame"], each["latent_frames"]) for each in previews] == [(n, 5) for n in range(5)]
    assert previews[0]["image"].startswith("data:image/png;base64,")
    plain = events(server.client.post("/api/video?mode=stream", json=asked | {"previews": False}).text)
    assert "preview" not in [name for name, _ in plain]
    frames = [[data["image"] for name, data in each if name == "frame"] for each in (told, plain)]
    assert frames[0] == frames[1]


def test_the_description_has_every_endpoint_and_examples(server):
    told = server.client.get("/openapi.json").json()
    paths = {"generate", "score", "classify", "encode", "decode", "reprompt", "vary", "interpolate", "inpaint", "video"}
    for path in paths:
        body = told["paths"][f"/api/{path}"]["post"]["requestBody"]["content"]
        assert body["application/json"]["example"] and body["application/json"]["schema"]["properties"]
    assert {"/v1/models", "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"} <= set(told["paths"])
