"""What models trained on several shapes, frame rates or noise levels want to read around a prompt."""

from __future__ import annotations

from mlx_starflow.models.starflow import FlowConfig


def complete_prompt(prompt: str, config: FlowConfig, *, ratio: str = "1:1", fps: int = 0) -> str:
    """The text to be encoded for a prompt; for most models the prompt itself.

    The flow's config says what belongs around it: `cond_noise_level` the standard deviation of the training noise in
    thousandths, `fps_cond` the frame rate or that this is an image, `mix_aspect` the aspect ratio. The empty prompt,
    which guidance compares with, is completed as any other. The words are the release's; its line breaks are spaces
    here, which to the tokenizer is the same.

    Args:
        ratio: width to height, one of `buckets.RATIOS`.
        fps: frames a second; 0 for an image.
    """
    words = [prompt]
    if config.fps_cond:
        words.insert(0, f"A video with {fps} fps:" if fps > 0 else "An image:")
    if config.cond_noise_level:
        words.insert(0, f"Noise Level {int(config.noise_std * 1000)}:")
    if config.mix_aspect:
        words.append(f"in a {ratio} aspect ratio.")
    return " ".join(filter(None, words))
