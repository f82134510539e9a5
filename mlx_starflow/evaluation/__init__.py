"""How good a model is: distances between samples and real pictures, and what exact likelihood says besides."""

from mlx_starflow.evaluation.clip_score import CLIPScorer
from mlx_starflow.evaluation.features import Features, InceptionFeatures, OwnFeatures, find_inception
from mlx_starflow.evaluation.measures import (
    Estimate,
    Gaussian,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from mlx_starflow.evaluation.prompts import ListedPrompt, read_prompts
from mlx_starflow.evaluation.report import Evaluation
from mlx_starflow.evaluation.run import EvaluationSettings, evaluate
from mlx_starflow.evaluation.statistics import read_statistics, write_statistics

__all__ = [
    "CLIPScorer",
    "Estimate",
    "Evaluation",
    "EvaluationSettings",
    "Features",
    "Gaussian",
    "InceptionFeatures",
    "ListedPrompt",
    "OwnFeatures",
    "evaluate",
    "find_inception",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "read_prompts",
    "read_statistics",
    "write_statistics",
]
