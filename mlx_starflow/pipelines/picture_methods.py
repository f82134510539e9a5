"""`scoring` and `editing` as methods of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from mlx_starflow.editing import Edit, Encoded, Inpainting, RoundTrip
    from mlx_starflow.likelihood import Score
    from mlx_starflow.likelihood.prompts import BestOf, Classification


class PictureMethods:
    """What a pipeline does with pictures that are there already. Arguments and errors are those of the functions."""

    def score(self, images: Iterable[Image.Image], prompts: str | Sequence[str] = "", **options: Any) -> list[Score]:
        """Exact likelihood of pictures, see `scoring.score`."""
        from mlx_starflow.likelihood import score

        return score(self, images, prompts, **options)

    def prompt_fit(self, images: Iterable[Image.Image], prompts: Sequence[str], **options: Any) -> np.ndarray:
        """log p(x | prompt) - log p(x) in nats, `[draws, pictures, prompts]`, see `scoring.prompt_fit`."""
        from mlx_starflow.likelihood import prompt_fit

        return prompt_fit(self, images, prompts, **options)

    def classify(self, images: Iterable[Image.Image], labels: Sequence[str], **options: Any) -> Classification:
        """Which label pictures have, see `scoring.classify`."""
        from mlx_starflow.likelihood import classify

        return classify(self, images, labels, **options)

    def best_of(self, prompts: str | Sequence[str], candidates: int, **options: Any) -> BestOf:
        """The best of several samples by prompt fit, see `scoring.best_of`."""
        from mlx_starflow.likelihood import best_of

        return best_of(self, prompts, candidates, **options)

    def encode(
        self, images: Iterable[Image.Image], prompts: str | Sequence[str] = "", **options: Any
    ) -> tuple[Encoded, RoundTrip | None]:
        """Pictures to noise, see `editing.encode`."""
        from mlx_starflow.editing import encode

        return encode(self, images, prompts, **options)

    def decode(self, encoded: Encoded, **options: Any) -> tuple[list[Image.Image], np.ndarray]:
        """Noise to pictures and their latents, see `editing.decode`."""
        from mlx_starflow.editing import decode

        return decode(self, encoded, **options)

    def inpaint(self, image: Image.Image, mask: Image.Image, prompt: str = "", **options: Any) -> Inpainting:
        """A part of a picture painted anew, see `editing.inpaint`."""
        from mlx_starflow.editing import inpaint

        return inpaint(self, image, mask, prompt, **options)

    def reprompt(self, image: Image.Image, source: str, target: str, *args: Any, **options: Any) -> Edit:
        """A picture of something else in the same pose, see `editing.reprompt`."""
        from mlx_starflow.editing import reprompt

        return reprompt(self, image, source, target, *args, **options)

    def vary(self, image: Image.Image, prompt: str = "", *args: Any, **options: Any) -> Edit:
        """Pictures near a picture, see `editing.vary`; the noise has the pipeline's temperature by default."""
        from mlx_starflow.editing import vary

        return vary(self, image, prompt, *args, **options)

    def interpolate(self, first: Image.Image, second: Image.Image, *args: Any, **options: Any) -> Edit:
        """Pictures on the way from one to another, see `editing.interpolate`."""
        from mlx_starflow.editing import interpolate

        return interpolate(self, first, second, *args, **options)
