"""What clients may ask for, field by field; FastAPI's description of the API is made of these too.

JSON has to have the right types; fields of forms are texts, and are read as numbers where numbers are wanted. Images
are base64, a data URL, the id of one in the gallery, or a part of a form. Validation is given the server's limits and
gallery as context.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo, WithJsonSchema

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.pixels import UnreadableImage, no_remarks, stored_size
from mlx_starflow.server.gallery import Gallery
from mlx_starflow.server.limits import Limits
from mlx_starflow.server.refusals import Refusal

MOST_SEED = 2**63 - 1


def _limits(info: ValidationInfo) -> Limits:
    context = info.context or {}
    found = context.get("limits")
    return found if isinstance(found, Limits) else Limits()


def _text(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str):
        try:
            _limits(info).check_text(value)
        except StarflowError as error:
            raise ValueError(str(error)) from None
    return value


def _content(value: Any, info: ValidationInfo) -> bytes:
    """The bytes of an image or of another file, however it is sent."""
    gallery = (info.context or {}).get("gallery")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError("an image is base64, a data URL, or the id of one in the gallery")
    if len(value) == 31 and isinstance(gallery, Gallery):
        try:
            return gallery.content(gallery.find(value))
        except Refusal as refusal:
            raise ValueError(refusal.message) from None
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("an image is base64, a data URL, or the id of one in the gallery") from None


def _picture(value: Any, info: ValidationInfo) -> bytes:
    """The bytes of an image that is small enough to be decoded."""
    content, most = _content(value, info), _limits(info).pixels
    try:
        with no_remarks():
            width, height = stored_size(content)
    except UnreadableImage as error:
        raise ValueError(f"the image cannot be read: {error}") from None
    if width * height > most:
        raise ValueError(f"the image has {width}x{height} pixels, and {most} are the most in all")
    return content


def _size(value: Any) -> Any:
    """ "128x128" -> (128, 128); "auto" -> None."""
    if value is None or value == "auto":
        return None
    if isinstance(value, tuple):
        return value
    try:
        width, height = (int(side) for side in str(value).lower().split("x"))
        if not (
            isinstance(value, str) and len(value) < 12 and 1 <= min(width, height) <= max(width, height) <= 1 << 16
        ):
            raise ValueError
    except ValueError:
        raise ValueError('a size is WIDTHxHEIGHT in pixels, such as "128x128", or "auto"') from None
    return width, height


def _hidden(value: bytes) -> str:
    return f"{len(value)} bytes"


Text = Annotated[str, BeforeValidator(_text)]
Picture = Annotated[
    bytes,
    BeforeValidator(_picture),
    PlainSerializer(_hidden),
    WithJsonSchema({"type": "string", "description": "base64, a data URL, or the id of an image in the gallery"}),
]
File = Annotated[
    bytes,
    BeforeValidator(_content),
    PlainSerializer(_hidden),
    WithJsonSchema({"type": "string", "description": "base64"}),
]
Size = Annotated[
    tuple[int, int] | None,
    BeforeValidator(_size),
    WithJsonSchema({"type": "string", "examples": ["auto", "128x128"]}),
]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Upscale = Annotated[
    int | None,
    Field(ge=2, le=4, multiple_of=2, description="enlarge the result 2 or 4 times, where the server has what does so"),
]
FlowMethod = Literal["auto", "sequential", "jacobi", "rolling"]
"""Ways of the flow that need nothing besides."""

Method = Literal["auto", "sequential", "jacobi", "rolling", "draft"]
Student = Annotated[
    str | None,
    Field(max_length=1000, description="id of a student of the model, which makes the images, or with draft guesses"),
]
Steps = Annotated[int | None, Field(ge=1, le=1000, description="of the student; its own number by default")]


class Request(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())

    model: str | None = Field(default=None, description="id of a model of /v1/models; the first one by default")


class Sampling(Request):
    """How images are sampled; what is left out is as the model's own settings say."""

    guidance: float | None = Field(default=None, ge=0, le=1000, description="weight of classifier-free guidance")
    temperature: float | None = Field(default=None, ge=0, le=1000, description="the noise is multiplied by this")
    attn_temp: float | None = Field(default=None, gt=0, le=1000, description="attention logits are divided by this")
    denoise: bool | None = Field(default=None, description="clean the sample of the flow's training noise")
    verify: bool | None = Field(
        default=None, description="compute certificates; by default unless the method is sequential"
    )
    upscale: Upscale = None


class Generate(Sampling):
    """Images of a prompt."""

    prompt: Text = Field(examples=["a fox to the left of a cactus at night"])
    method: Method | None = None
    student: Student = None
    steps: Steps = None
    n: int = Field(default=1, ge=1, description="images, with seeds that count up")
    seed: Seed | None = Field(default=None, description="of the first image; drawn if left out", examples=[7])
    size: Size = None
    best_of: int = Field(
        default=1, ge=1, le=64, description="samples of which each image is the one that the prompt fits best"
    )
    previews: bool = Field(default=False, description="tell a preview after each block, as an event")
    keep: bool = Field(
        default=True, description="put the images into the gallery; else they are in the answer alone, as data URLs"
    )


class Score(Request):
    """The exact likelihood of an image, and where it comes from."""

    image: Picture
    prompt: Text = ""
    draws: int = Field(default=4, ge=1, le=64, description="of the training noise")
    seed: Seed = 0
    size: Size = None


class Classify(Request):
    """Which of some labels an image has, by Bayes' rule."""

    image: Picture
    labels: list[Text] = Field(default=[], description="all classes by default, if the model knows classes")
    draws: int = Field(default=4, ge=1, le=64)
    seed: Seed = 0
    size: Size = None


class Encode(Request):
    """The noise that an image comes from."""

    image: Picture
    prompt: Text = ""
    guidance: float = Field(default=0.0, ge=0, le=1000)
    noise_seed: Seed | None = Field(default=None, description="add training noise of this seed first")
    check: bool = Field(default=True, description="go the way back too, and say how exact it is")
    size: Size = None


class Decode(Request):
    """The image of noise that `encode` gave."""

    noise: File = Field(description="safetensors, as `encode` gives it")
    prompt: Text | None = Field(default=None, description="another one than the noise was encoded with")
    denoise: bool = False


class Edit(Request):
    """What edits have in common."""

    method: FlowMethod | None = None
    size: Size = None
    upscale: Upscale = None


class Reprompt(Edit):
    """The noise of an image under one prompt, regenerated under another."""

    image: Picture
    source: Text = Field(default="", description="what is on it")
    target: Text = Field(description="what shall be")
    strengths: list[float] = Field(default=[1.0], min_length=1, description="an image for each; 0 is the image itself")


class Vary(Edit):
    """Images near an image."""

    image: Picture
    prompt: Text = ""
    strengths: list[float] = Field(default=[0.3], min_length=1, description="an image for each, 0 to 1")
    n: int = Field(default=1, ge=1, description="paths, each with all strengths")
    seed: Seed = 0
    temperature: float | None = Field(default=None, ge=0, le=1000)


class Interpolate(Edit):
    """Images on the way between the noises of two images."""

    first: Picture
    second: Picture
    prompts: list[Text] = Field(default=["", ""], min_length=2, max_length=2, description="what is on them")
    shares: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1, description="of the way, 0 to 1")


class Inpaint(Edit):
    """The free part of an image, painted anew."""

    image: Picture
    mask: Picture | None = Field(
        default=None, description="an image of the same size, white, or transparent, where it is free"
    )
    rectangle: str | None = Field(default=None, max_length=60, description="instead: x,y,w,h", examples=["32,32,64,64"])
    prompt: Text = ""
    n: int = Field(default=1, ge=1)
    seed: Seed = 0
    steps: int | None = Field(default=None, ge=1, le=1000)
    rounds: int | None = Field(default=None, ge=1, le=100)
    strength: float | None = Field(default=None, gt=0, le=1)
    feather: int | None = Field(default=None, ge=0, le=10_000, description="pixels about the mask that are blended")


class Video(Sampling):
    """A video of a prompt, from a first image if one is given."""

    prompt: Text
    method: FlowMethod | None = None
    image: Picture | None = None
    seed: Seed | None = None
    frames: int | None = Field(default=None, ge=1, description="1 + a multiple of 4")
    size: Size = None
    fps: int | None = Field(default=None, ge=1, le=1000)
    previews: bool = Field(
        default=False, description="tell a preview of each latent frame, before those after it are there, as an event"
    )


class Session(BaseModel):
    """What a browser shows once."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(max_length=1000)
