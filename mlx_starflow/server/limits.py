"""How much may be asked for: of one request, of one job, and of all together."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_starflow.errors import StarflowError

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What is refused before any work begins, or ended when it takes too long.

    Attributes:
        queue: jobs that may wait.
        images: that one request may ask for.
        body: bytes of a request.
        bodies: requests whose bodies are being read, or held, at the same time.
        pixels: of an image that is sent, decoded.
        prompt: characters of a text.
        labels: texts to classify with.
        frames: of a video.
        timeout: seconds that a job may run.
        read_timeout: seconds that a request's body may take to arrive.
        connections: open at the same time.
    """

    queue: int = 16
    images: int = 10
    body: int = 32 * MEGABYTE
    bodies: int = 16
    pixels: int = 1 << 24
    prompt: int = 4000
    labels: int = 100
    frames: int = 257
    timeout: float = 600.0
    read_timeout: float = 30.0
    connections: int = 256

    def __post_init__(self) -> None:
        for name, least in {"queue": 1, "images": 1, "body": 1024, "bodies": 1, "pixels": 1}.items():
            if getattr(self, name) < least:
                raise StarflowError(f"the limit of {name} must be {least} or more, not {getattr(self, name)}")
        for name in ("prompt", "labels", "frames", "timeout", "read_timeout", "connections"):
            if not getattr(self, name) > 0:
                raise StarflowError(f"the limit of {name} must be above 0, not {getattr(self, name):g}")

    def check_text(self, text: str) -> None:
        """Raise StarflowError if a prompt is too long."""
        if len(text) > self.prompt:
            raise StarflowError(f"a prompt has at most {self.prompt} characters here, not {len(text)}")
