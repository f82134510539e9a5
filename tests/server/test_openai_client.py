"""OpenAI's own client, as it is on PyPI, with another base URL."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def image_of(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def picture(size: tuple[int, int] = (8, 8)) -> bytes:
    target = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(target, "PNG")
    return target.getvalue()


def mask(kind: str = "transparent") -> bytes:
    """The lower half is free: transparent or, where nothing is, white; with an alpha channel or without one."""
    image = Image.new("RGBA", (8, 8), (90, 90, 90, 255))
    image.paste((90, 90, 90, 0), (0, 4, 8, 8))
    if kind != "transparent":
        image = image.getchannel("A").point(lambda value: 255 - value)
    if kind == "opaque":
        image = image.convert("RGBA")
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def test_models(client):
    assert [model.id for model in client.models.list()] == ["pictures", "labels", "movies"]
    assert client.models.retrieve("labels").owned_by == "mlx-starflow"


def test_generate(client):
    result = client.images.generate(prompt="a cat", n=2, size="16x8", extra_body={"seed": 5})
    assert [image_of(each.b64_json).size for each in result.data] == [(16, 8)] * 2
    assert result.size == "16x8" and result.output_format == "png"
    again = client.images.generate(prompt="a cat", n=2, size="16x8", extra_body={"seed": 5})
    assert [each.b64_json for each in again.data] == [each.b64_json for each in result.data]
    other = client.images.generate(prompt="a cat", extra_body={"guidance": 3.0, "seed": 5})
    assert other.data[0].b64_json != result.data[0].b64_json


@pytest.mark.parametrize(("format", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats_and_addresses(client, server, format, name):
    result = client.images.generate(prompt="a cat", output_format=format, response_format="url")
    assert result.data[0].b64_json is None and result.data[0].url.startswith(server.url)
    answer = server.client.get(result.data[0].url)
    assert answer.headers["content-type"] == f"image/{format}"
    assert Image.open(io.BytesIO(answer.content)).format == name
    result = client.images.generate(prompt="a cat", output_format=format)
    assert image_of(result.data[0].b64_json).format == name


def test_a_coarse_jpeg_is_smaller(client):
    def size(quality: int) -> int:
        result = client.images.generate(
            prompt="a cat",
            size="64x64",
            output_format="jpeg",
            output_compression=quality,
            extra_body={"seed": 1, "method": "jacobi"},
        )
        return len(result.data[0].b64_json)

    assert size(10) < size(95)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_stream_has_as_many_partial_images_as_there_are_blocks_for(client, count):
    stream = client.images.generate(prompt="a cat", stream=True, partial_images=count, extra_body={"seed": 1})
    events = list(stream)
    # Of two blocks, one leaves something unfinished.
    partial = min(count, 1)
    assert [event.type for event in events] == ["image_generation.partial_image"] * partial + [
        "image_generation.completed"
    ]
    assert [event.partial_image_index for event in events[:-1]] == list(range(partial))
    whole = client.images.generate(prompt="a cat", extra_body={"seed": 1})
    assert events[-1].b64_json == whole.data[0].b64_json
    assert {image_of(event.b64_json).size for event in events} == {(8, 8)}


@pytest.mark.parametrize("kind", ["transparent", "white", "opaque"])
def test_edits_paint_what_the_mask_leaves_free(client, kind):
    original = picture()
    result = client.images.edit(image=original, mask=mask(kind), prompt="a cat", extra_body={"seed": 2})
    before, after = (
        image.convert("RGB").tobytes()
        for image in (Image.open(io.BytesIO(original)), image_of(result.data[0].b64_json))
    )
    assert before[:96] == after[:96] and before[96:] != after[96:]


def test_holes_in_the_image_are_its_mask(client):
    image = Image.open(io.BytesIO(picture())).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 4, 8, 8))
    target = io.BytesIO()
    image.save(target, "PNG")
    result = client.images.edit(image=target.getvalue(), prompt="a cat")
    after = image_of(result.data[0].b64_json).convert("RGB").tobytes()
    assert after[:96] == image.convert("RGB").tobytes()[:96]


def test_without_a_mask_the_image_is_prompted_anew(client):
    result = client.images.edit(image=picture(), prompt="a cat")
    assert image_of(result.data[0].b64_json).size == (8, 8)
    with pytest.raises(openai.BadRequestError, match="without a mask"):
        client.images.edit(image=picture(), prompt="a cat", n=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_variations(client):
    result = client.images.create_variation(image=picture(), n=2)
    assert len(result.data) == 2 and result.data[0].b64_json != result.data[1].b64_json


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-image-1'") as error:
        client.images.generate(prompt="a cat", model="gpt-image-1")
    assert error.value.code == "model_not_found" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(prompt="a cat", n=7)
    assert "at most 6" in str(error.value)
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(prompt="a cat", size="7x7")
    assert "multiples of 2 pixels" in str(error.value)
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(prompt="a cat", extra_body={"no_such": 1})
    assert error.value.param == "no_such"
    with pytest.raises(openai.APIError, match="multiples of 2"):
        list(client.images.generate(prompt="a cat", size="7x7", stream=True))
