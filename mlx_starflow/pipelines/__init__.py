"""Prompts to images and videos: pipelines, of the kind and the backend that a model needs; `load` opens one."""

from mlx_starflow.pipelines.base import Pipeline
from mlx_starflow.pipelines.best_of import BestOf
from mlx_starflow.pipelines.class_labels import ClassPipeline
from mlx_starflow.pipelines.image import ImagePipeline
from mlx_starflow.pipelines.loading import load, load_class_labels, load_video, open_model
from mlx_starflow.pipelines.results import (
    GeneratedImage,
    GenerationResult,
    GenerationSettings,
    GenerationStats,
    ImageStream,
)
from mlx_starflow.pipelines.text import TextPipeline, TextResult, load_text
from mlx_starflow.pipelines.upscaling import Upscaler
from mlx_starflow.pipelines.video import VideoPipeline
from mlx_starflow.pipelines.video_results import VideoResult, VideoSettings, VideoStream

__all__ = [
    "BestOf",
    "ClassPipeline",
    "GeneratedImage",
    "GenerationResult",
    "GenerationSettings",
    "GenerationStats",
    "ImagePipeline",
    "ImageStream",
    "Pipeline",
    "TextPipeline",
    "TextResult",
    "Upscaler",
    "VideoPipeline",
    "VideoResult",
    "VideoSettings",
    "VideoStream",
    "load",
    "load_class_labels",
    "load_text",
    "load_video",
    "open_model",
]
