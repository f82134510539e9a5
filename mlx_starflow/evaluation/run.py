"""How good a model is: samples against real pictures, in the field's measures, and what only a flow can say itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.evaluation.clip_score import CLIPScorer
from mlx_starflow.evaluation.features import Features, InceptionFeatures, OwnFeatures
from mlx_starflow.evaluation.likelihoods import (
    LikelihoodGap,
    Scores,
    Typicality,
    bits,
    captions_of,
    chosen,
    score_pictures,
)
from mlx_starflow.evaluation.measures import (
    LEAST,
    Estimate,
    Gaussian,
    check_enough,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from mlx_starflow.evaluation.memorization import Memorization, find_memorized
from mlx_starflow.evaluation.pictures import MOST_SAMPLES, Pictures, Samples, make_samples, read_pictures
from mlx_starflow.evaluation.prompts import ListedPrompt
from mlx_starflow.evaluation.report import USUAL_COUNT, Evaluation, FlowMeasures, SampleMeasures
from mlx_starflow.evaluation.store import Store
from mlx_starflow.media.image_files import ImageFile
from mlx_starflow.media.noise import check_seeds
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.pipelines.class_labels import ClassPipeline
from mlx_starflow.pipelines.image_maker import ImageMaker
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.sampling.progress import Callback, Progress, Watch, watch

MOST_BY_DEFAULT = 5000
"""Samples, if nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What an evaluation computes.

    Attributes:
        count: samples; None: one for each prompt of a list, else as many as there are real pictures, at most 5,000.
        seed: of the first sample; the others count up.
        batch_size: samples at once.
        likelihood: pictures of each kind whose likelihood is computed; 0: none.
        draws: of the training noise, for it.
        verify: run the flow forwards over every sample too, and report the worst certificate.
    """

    count: int | None = None
    seed: int = 0
    batch_size: int = 8
    likelihood: int = 256
    draws: int = 4
    verify: bool = False

    def __post_init__(self) -> None:
        check_seeds([self.seed])
        if self.count is not None and not LEAST <= self.count <= MOST_SAMPLES:
            raise StarflowError(f"an evaluation takes {LEAST} to {MOST_SAMPLES:,} samples, not {self.count:,}")
        if self.batch_size < 1 or self.likelihood < 0 or self.draws < 1:
            raise StarflowError("batch size and draws are 1 or more, and pictures with a likelihood 0 or more")


@checked
def evaluate(
    model: ImageMaker,
    data: Sequence[ImageFile] = (),
    *,
    held_out: Sequence[ImageFile] = (),
    prompts: Sequence[ListedPrompt] | None = None,
    statistics: Gaussian | None = None,
    features: InceptionFeatures | OwnFeatures | None = None,
    clip: CLIPScorer | None = None,
    settings: EvaluationSettings | None = None,
    sampling: GenerationSettings | None = None,
    folder: Path | None = None,
    progress: Watch = False,
    callback: Callback | None = None,
) -> tuple[Evaluation, Gaussian | None]:
    """Evaluate a model that makes images.

    Args:
        model: a pipeline of images or of classes.
        data: real pictures, such as `media.image_files.find_images` finds: those that the model was trained on.
        held_out: pictures that it was not trained on.
        prompts: of the samples; by default the captions of `data`, or all classes in turn, or no prompt.
        statistics: of features of real pictures, instead of `data`, for the Fréchet distance alone.
        features: what pictures are compared by; the model's own by default.
        clip: scores samples by their prompts.
        settings: what is computed.
        sampling: how samples are made; the model's own settings by default.
        folder: where all that is computed is kept, so that the same call goes on where an earlier one was stopped, with
            the same result.

    Returns:
        The evaluation; and statistics of the features of `data`, None if there is none.

    Raises:
        StarflowError: there are too few pictures, statistics of other features, or the folder holds another evaluation.
    """
    settings, sampling = settings or EvaluationSettings(), sampling or model.settings
    mark = fingerprint(model.directory)
    run = _Run(
        model,
        features or OwnFeatures(model, mark),
        clip,
        settings,
        sampling,
        Store(folder, _identity(mark, features, clip, settings, sampling, model)),
        watch(progress, callback),
    )
    if not data and statistics is None:
        raise StarflowError("there is nothing to compare samples with: give real pictures, or statistics of them")
    if statistics is not None and len(statistics.mean) != run.features.dimensions:
        raise StarflowError(
            f"the statistics are of {len(statistics.mean)} features and {run.features.name} has "
            f"{run.features.dimensions}: official ones are of Inception-V3 (--inception)"
        )
    return run.run(data, held_out, prompts, statistics)


def _identity(
    mark: str,
    features: Features | None,
    clip: CLIPScorer | None,
    settings: EvaluationSettings,
    sampling: GenerationSettings,
    model: ImageMaker,
) -> dict[str, object]:
    """What all parts that are kept have in common; how many samples there are may grow."""
    plan = model.method(sampling)
    return {
        "model": mark,
        "precision": model.backend.flow_precision,
        "adapters": [list(each) for each in model.backend.adapters],
        "features": features.identity if features else "own",
        "clip": clip.identity if clip else None,
        "sampling": asdict(sampling),
        "method": plan if isinstance(plan, str) else plan.to_dict(),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "likelihood": settings.likelihood,
        "verify": settings.verify,
    }


@dataclass(frozen=True)
class _Run:
    model: ImageMaker
    features: Features
    clip: CLIPScorer | None
    settings: EvaluationSettings
    sampling: GenerationSettings
    store: Store
    progress: Progress

    def run(
        self,
        data: Sequence[ImageFile],
        held_out: Sequence[ImageFile],
        prompts: Sequence[ListedPrompt] | None,
        statistics: Gaussian | None,
    ) -> tuple[Evaluation, Gaussian | None]:
        listed = prompts or self._own_prompts(data)
        self.model.check_prompts(list(dict.fromkeys(each.text for each in listed)))
        real, unseen = self._read(data, "data"), self._read(held_out, "held-out")
        self.model.release("vae")
        count = self._count(real, prompts)
        gaussian = statistics
        if real is not None and gaussian is None:
            gaussian = Gaussian.of(real.features)
        samples = make_samples(
            self.model,
            listed,
            count,
            self.sampling,
            self.features,
            self.clip,
            self.store,
            self.progress,
            seed=self.settings.seed,
            batch_size=self.settings.batch_size,
            with_data=self.settings.likelihood,
            verify=self.settings.verify,
        )
        check_enough(samples.features)
        assert gaussian is not None  # there are pictures or statistics
        counts = {"samples": count} | {
            name: len(each.files) for name, each in (("data", real), ("held-out", unseen)) if each is not None
        }
        evaluation = Evaluation(
            model=self.model.name,
            dimension=self.model.dimension,
            counts=counts,
            settings={**asdict(self.sampling), "seed": self.settings.seed, "features": self.features.identity},
            samples=self._measures(gaussian, real, samples),
            clip=None if self.clip is None or samples.clip is None else (self.clip.name, Estimate.of(samples.clip)),
            clip_by_kind=_by_kind(samples),
            flow=self._flow(real, unseen, samples),
            memorization=self._memorization(real, unseen, samples),
            certificate=None if np.isnan(samples.certificate) else samples.certificate,
            skipped=[pair for each in (real, unseen) if each is not None for pair in each.skipped],
            warnings=self._warnings(gaussian, count),
        )
        return evaluation, None if real is None else Gaussian.of(real.features)

    @property
    def _size(self) -> tuple[int, int]:
        return self.sampling.size or self.model.size

    def _read(self, files: Sequence[ImageFile], kind: str) -> Pictures | None:
        if not files:
            return None
        found = read_pictures(self.model, files, kind, self.features, self.store, self.progress, self._size)
        check_enough(found.features)
        return found

    def _own_prompts(self, data: Sequence[ImageFile]) -> list[ListedPrompt]:
        """Captions of the data, or all classes, or no prompt."""
        if captions := captions_of(self.model, data) if data else None:
            return [ListedPrompt(caption) for caption in captions]
        if isinstance(self.model, ClassPipeline) and self.model.classes:
            return [ListedPrompt(name) for name in self.model.classes]
        return [ListedPrompt("")]

    def _count(self, real: Pictures | None, prompts: Sequence[ListedPrompt] | None) -> int:
        if self.settings.count is not None:
            return self.settings.count
        if prompts is not None:
            return max(len(prompts), LEAST)
        return MOST_BY_DEFAULT if real is None else min(len(real.files), MOST_BY_DEFAULT)

    def _measures(self, gaussian: Gaussian, real: Pictures | None, samples: Samples) -> SampleMeasures:
        name = self.features.name
        if isinstance(self.features, InceptionFeatures):
            name += f", resized as {self.features.resize}"
        frechet = frechet_distance(gaussian, Gaussian.of(samples.features))
        if real is None:
            return SampleMeasures(name, frechet)
        kernel = kernel_distance(real.features, samples.features)
        return SampleMeasures(name, frechet, kernel, *precision_recall(real.features, samples.features))

    def _flow(self, real: Pictures | None, unseen: Pictures | None, samples: Samples) -> FlowMeasures | None:
        if not self.settings.likelihood or (real is None and unseen is None):
            return None
        scores = {
            kind: self._score(each, kind) for kind, each in (("data", real), ("held-out", unseen)) if each is not None
        }
        of = "held-out" if unseen is not None else "data"
        plain, made = scores[of], self._score_samples(samples)
        gap = LikelihoodGap.of(scores["data"], scores["held-out"]) if len(scores) == 2 else None
        nll = plain.nll
        return FlowMeasures(
            of=of,
            pictures=len(plain.plain),
            draws=self.settings.draws,
            nll=nll,
            bits=bits(self.model, nll.mean),
            prompt_fit=plain.prompt_fit,
            samples_prompt_fit=None if made is None else made.prompt_fit,
            typicality=None if made is None else Typicality.of(made, plain),
            gap=gap,
        )

    def _score(self, pictures: Pictures, kind: str) -> Scores:
        files = chosen(pictures.files, self.settings.likelihood)
        fitted = (self.model.fit(each.open(), self._size) for each in files)
        data = self.model.to_data(fitted, self._size)
        self.model.release("vae")
        return self._scored(data, captions_of(self.model, files), kind)

    def _score_samples(self, samples: Samples) -> Scores | None:
        if samples.data is None:
            return None
        texts = [each.text.strip() for each in samples.prompts[: len(samples.data)]]
        return self._scored(samples.data, texts if all(texts) else None, "samples")

    def _scored(self, data: np.ndarray, prompts: Sequence[str] | None, kind: str) -> Scores:
        return score_pictures(
            self.model,
            data,
            prompts,
            kind,
            self.store,
            self.progress,
            draws=self.settings.draws,
            seed=self.settings.seed,
        )

    def _memorization(self, real: Pictures | None, unseen: Pictures | None, samples: Samples) -> Memorization | None:
        if real is None:
            return None
        return find_memorized(
            real.features,
            [each.name for each in real.files],
            samples.features,
            [each.text for each in samples.prompts],
            self.settings.seed,
            None if unseen is None else unseen.features,
        )

    def _warnings(self, gaussian: Gaussian, count: int) -> list[str]:
        found = []
        fewest = min(count, gaussian.count or count)
        if fewest < USUAL_COUNT:
            found.append(
                f"a Fréchet distance of {fewest:,} pictures is too high, by about as much as one over their number; "
                "compare it with distances of as many pictures alone (published FIDs are of 50,000); the kernel "
                "distance has no such bias"
            )
        if fewest <= self.features.dimensions:
            found.append(
                f"{fewest:,} pictures do not determine a covariance of {self.features.dimensions:,} features: trust "
                "the kernel distance"
            )
        if not isinstance(self.features, InceptionFeatures):
            found.append(
                f"these distances are in {self.features.name} features, not Inception-V3's: they compare with "
                "evaluations of the same model alone"
            )
        elif not self.features.is_official:
            found.append("the weights of Inception-V3 are not the usual file's: no published FID compares with these")
        return found


def _by_kind(samples: Samples) -> dict[str, Estimate] | None:
    """CLIP scores by kind of prompt, if there are kinds."""
    kinds = [each.kind for each in samples.prompts]
    if samples.clip is None or not any(kinds):
        return None
    names = np.array(kinds)
    return {kind: Estimate.of(samples.clip[names == kind]) for kind in dict.fromkeys(kinds)}
