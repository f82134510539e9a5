"""Every figure that docs/likelihood.md states, and its pictures.

    python examples/reports/embedded_model.py data/scenes runs/scenes --only-evaluator    # an hour on one CPU core
    python examples/reports/likelihood.py data/scenes docs --evaluator runs/scenes/evaluator.pt

Scenes are drawn by program (`scene_data.py`): the first of the training stream, which the model was trained on, as many
of kinds that training never shows, and fresh ones. What a sample shows is judged by a classifier that is no part of the
model (`scene_evaluator.py`). The photographs are sample pictures of scikit-image (public domain or CC0) and
scikit-learn (china.jpg and flower.jpg, CC BY 2.0), taken out of their wheels, which `pip download` fetches from PyPI.
`--only` runs some of the parts; `--count` and `--prompts` make them longer or shorter.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scene_data import FRESH, Sample, Stream
from scene_pictures import Renderer
from scene_words import KINDS, Scene

from mlx_starflow.editing import encode, interpolate, reprompt
from mlx_starflow.likelihood import CalibrationStatistics, heat_map, score, standard_error, token_nats, with_noise
from mlx_starflow.likelihood.prompts import log_likelihoods
from mlx_starflow.media.images import grid, save_image
from mlx_starflow.media.pixels import crop_image
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.pipelines import ImagePipeline, load

WHEELS = ("scikit-image==0.26.0", "scikit-learn==1.9.1")
PHOTOGRAPHS = (
    *(f"skimage/data/{name}.png" for name in "astronaut brick camera chelsea coffee coins grass gravel moon".split()),
    "skimage/data/clock_motion.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
)
VIEWS = 8
"""Parts of each photograph."""

COUNT = 200
"""Scenes of either kind, trained and held out."""

PROMPTS = 60
"""Of which the best of eight samples is taken."""

CAR = ("a car on a yellow background", Scene("one", ("car",), "yellow"))
TULIP = ("a tulip on a blue background", Scene("one", ("tulip",), "blue"))
APPLE = ("a red apple on a blue background", Scene("one", ("red apple",), "blue"))
DOG = ("a dog on grass", Scene("one", ("dog",), "grass"))
PAIR = ("a cat to the left of a dog on the beach", Scene("beside", ("cat", "dog"), "beach"))
SMILEY = ("a smiley", Scene("one", ("smiley",), ""))
BALL = ("a soccer ball on grass", Scene("one", ("soccer ball",), "grass"))
HEART = ("a red heart", Scene("one", ("red heart",), ""))
"""Trained scenes, with their captions."""


class Pictures:
    """Some scenes with their captions and latents."""

    def __init__(self, model: ImagePipeline, samples: list[Sample]):
        self.images = [Image.fromarray(sample.picture) for sample in samples]
        self.names = [sample.caption for sample in samples]
        self._model = model

    @cached_property
    def data(self) -> np.ndarray:
        return self.latents(len(self.images))

    def latents(self, count: int) -> np.ndarray:
        """Of the first scenes."""
        return self._model.to_data(self.images[:count])


class Report:
    """The parts, each a method that prints its figures."""

    def __init__(
        self,
        data: Path,
        pictures: Path,
        model: str,
        evaluator: Path | None,
        *,
        count: int = COUNT,
        prompts: int = PROMPTS,
    ):
        self.model = load(model)
        self.prompts = prompts
        self.size = self.model.size
        self.renderer, self.evaluator = Renderer(data), evaluator
        self.known = Pictures(self.model, [Stream(self.renderer)[number] for number in range(count)])
        held_out = zip(*(itertools.islice(Stream(self.renderer, 0, kind), count) for kind in KINDS[1:]), strict=True)
        self.unseen = Pictures(self.model, list(itertools.islice(itertools.chain.from_iterable(held_out), count)))
        self.folder = pictures
        self.statistics = CalibrationStatistics.find(self.model.directory)

    def draw(self, scene: Scene) -> Image.Image:
        return Image.fromarray(self.renderer.render(scene, np.random.default_rng(0)))

    def exactness(self) -> None:
        """The surprise map sums to the NLL, and log-dets are those of the Jacobian."""
        x = with_noise(self.model.flow, np.concatenate([self.known.latents(32), self.unseen.latents(20)]), 0)
        text = self.model.conditions([*self.known.names[:32], *self.unseen.names[:20]])
        out = self.model.dense_flow()(mx.array(x), text)
        nll = np.array(out.nll()) + 0.5 * math.log(2 * math.pi)
        maps = token_nats(self.model.flow, mx.array(x), text).sum(axis=1)
        gap = np.abs(maps.sum(axis=1) / x[0].size - nll).max()
        print(f"sum of the surprise map and NLL of {len(x)} pictures: largest difference {gap:.1e} nats per dimension")
        flow = tiny_flow()
        point = np.random.default_rng(1).standard_normal((1, 4, 4, 2)).astype(np.float32)
        exact = float(np.array(flow(mx.array(point)).log_det).sum())
        sign, numeric = np.linalg.slogdet(jacobian(lambda batch: np.array(flow(mx.array(batch)).z), point))
        print(
            f"log-det of a random flow of {point.size} dimensions: {exact:.5f}; of its Jacobian by finite differences: "
            f"{numeric:.5f} (sign {sign:+.0f}); difference {abs(exact - numeric):.1e}"
        )

    def round_trip(self) -> None:
        """Picture to noise and back; re-prompting at strength 0."""
        for what, pictures in {"training": self.known, "held-out": self.unseen}.items():
            encoded, trip = encode(self.model, pictures.images[:20], pictures.names[:20])
            print(f"20 {what} pictures to noise (standard deviation {encoded.noise.std():.3f}) and back: {trip}")
        error = []
        for name, scene in (APPLE, DOG, CAR):
            image = self.draw(scene)
            back = reprompt(self.model, image, name, "a key in the rain", [0.0])
            error.append(np.abs(back.data[0] - self.model.to_data([image])[0]).max())
        print(f"re-prompt at strength 0: largest difference of the latents {max(error):.1e} (3 pictures)")

    def prompt_fit(self, captions: int = 20) -> None:
        """Which of 20 captions fits a picture best."""
        rng = np.random.default_rng(0)
        for what, pictures in (("training", self.known), ("held-out", self.unseen)):
            right = {1: 0, 2: 0}
            numbers = range(len(pictures.names))
            for number in numbers:
                own = pictures.names[number]
                others = [name for name in dict.fromkeys(pictures.names) if name != own]
                asked = [own, *rng.choice(others, captions - 1, replace=False)]
                nats = log_likelihoods(self.model, pictures.data[number : number + 1], [*asked, ""], draws=max(right))
                fits = nats[:, :, :-1] - nats[:, :, -1:]
                for draws in right:
                    right[draws] += int(fits[:draws].mean(axis=0)[0].argmax() == 0)
            shares = ", ".join(f"{share / len(numbers):.1%} (draws: {draws})" for draws, share in right.items())
            print(f"prompt fit picks the caption among {captions}, {what} pictures ({len(numbers)}): {shares}")

    def best_of_eight(self, candidates: int = 8) -> None:
        """The best of eight against one sample: how many show all that the prompt says, as the evaluator sees it."""
        from scene_evaluator import Judge
        from torch_loop import Device

        if self.evaluator is None:
            raise SystemExit("best_of_eight needs --evaluator: see examples/reports/embedded_model.py")
        judge = Judge.read(self.evaluator, Device("cpu"))
        asked = [Stream(None)[FRESH + number] for number in range(self.prompts)]
        for what, settings in {
            "the model's settings (guidance 1, temperature 0.7)": {},
            "plain samples (guidance 0, temperature 1)": {"guidance": 0.0, "temperature": 1.0},
        }.items():
            right, nats = [], []
            for sample in asked:
                # What `best_of` does, but here all candidates are wanted.
                seeds = range(100, 100 + candidates)
                made = self.model.generate(sample.caption, seed=seeds, verify=False, **settings)
                both = log_likelihoods(
                    self.model, np.array(made.latents), [sample.caption, ""], draws=8, numbers=[0] * candidates
                )
                nats.append(both.mean(axis=0))
                verdicts = judge([np.asarray(image) for image in made.images])
                right.append([v.has_layout(sample.scene) and v.has_background(sample.scene) for v in verdicts])
            shows, (prompted, unprompted) = np.array(right, float), np.array(nats).transpose(2, 0, 1)
            print(
                f"{what}, {self.prompts} prompts: one sample in {shows.mean():.1%} shows all that was asked for, "
                f"one of {candidates} in {shows.max(axis=1).mean():.1%}"
            )
            for weight in (1.0, 0.5, 0.25, 0.0):
                best = (prompted - weight * unprompted).argmax(axis=1)
                gain = shows[np.arange(self.prompts), best] - shows.mean(axis=1)
                print(
                    f"    best by log p(x | prompt) - {weight:g} log p(x): {gain.mean():+.1%} +- "
                    f"{standard_error(gain):.1%}"
                )

    def anomalies(self, most: int = 100) -> None:
        """AUROC of raw NLL and of typicality against pictures of other kinds, without prompts."""
        rng = np.random.default_rng(0)
        known, unseen = self.known.images[:most], self.unseen.images[:most]
        count = len(known)
        kinds = {
            "training": known,
            "held-out": unseen,
            "training, patches shuffled": [shuffled(image, rng) for image in known],
            "held-out, patches shuffled": [shuffled(image, rng) for image in unseen],
            "photographs": photographs(self.size, rng),
            "uniform noise": [noise_picture(self.size, rng) for _ in range(count)],
            "one colour": [Image.new("RGB", self.size, tuple(rng.integers(0, 256, 3).tolist())) for _ in range(count)],
            "training, small on white": [shrunk(image) for image in known],
        }
        nll, distance = {}, {}
        for kind, images in kinds.items():
            scores = score(self.model, images, draws=2)
            nll[kind] = np.array([each.nll for each in scores])
            distance[kind] = np.array([self.statistics.typicality(each).distance for each in scores])
            print(
                f"{kind:<28}{len(images):5} pictures  NLL {nll[kind].mean():8.3f} (5% to 95%: "
                f"{np.quantile(nll[kind], 0.05):7.3f} to {np.quantile(nll[kind], 0.95):8.3f})  "
                f"|NLL - mean| / std {np.median(distance[kind]):7.2f} (median)"
            )
        print(f"AUROC{'':<25}{'training against':^24}{'held-out against':^24}")
        print(f"{'':<30}" + f"{'raw NLL':>12}{'typicality':>12}" * 2)
        for kind in list(kinds)[2:]:
            values = [auroc(of[usual], of[kind]) for usual in ("training", "held-out") for of in (nll, distance)]
            print(f"{kind:<30}" + "".join(f"{value:12.3f}" for value in values))
        self._maps()

    def _maps(self) -> None:
        """Surprise of a picture and of itself with one patch exchanged."""
        name, scene = CAR
        image = self.draw(scene)
        spoiled = image.copy()
        middle = (48, 48, 80, 80)
        spoiled.paste(self.draw(TULIP[1]).crop(middle), (64, 64))
        scores = score(self.model, [image, spoiled], name)
        highest = max(each.surprise.max() for each in scores)
        maps = [heat_map(each, s.surprise, 0, highest) for each, s in zip([image, spoiled], scores, strict=True)]
        save_image(grid(maps, columns=2, gap=8), self.folder / "surprise.png")
        nll = ", ".join(f"{each.nll:.3f}" for each in scores)
        print(f"surprise.png: {name}, and with a patch of a tulip in it: NLL {nll}")

    def edits(self) -> None:
        """Re-prompting and interpolation, for people to look at."""
        shown: list[Image.Image] = []
        steps = [0.0, 0.25, 0.5, 0.75, 1.0, 2.0]
        for (source, scene), target in (
            (APPLE, "a green apple on a blue background"),
            (DOG, "a cat on grass"),
            (PAIR, "a cat to the left of a dog at night"),
        ):
            image = self.draw(scene)
            result = reprompt(self.model, image, source, target, steps)
            shown += [image, *result.images]
        for ends in ((SMILEY, BALL), (HEART, CAR)):
            images, names = [self.draw(scene) for _, scene in ends], [name for name, _ in ends]
            shown += interpolate(self.model, *images, names, np.linspace(0, 1, len(steps) + 1)).images
        save_image(grid(shown, columns=len(steps) + 1), self.folder / "edits.png")
        print(f"edits.png: a picture, then re-prompted with strengths {', '.join(f'{s:g}' for s in steps)}")


# ---- pictures of other kinds


def shuffled(image: Image.Image, rng: np.random.Generator, side: int = 32) -> Image.Image:
    """A picture's square patches in another order."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    patches = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
    patches = rng.permutation(patches).reshape(rows, columns, side, side, 3)
    return Image.fromarray(np.ascontiguousarray(patches.transpose(0, 2, 1, 3, 4)).reshape(pixels.shape))


def shrunk(image: Image.Image, part: int = 4) -> Image.Image:
    """A picture at a fraction of its size, in the middle of white."""
    small = image.resize((image.width // part, image.height // part), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(small, ((image.width - small.width) // 2, (image.height - small.height) // 2))
    return canvas


def noise_picture(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


def photographs(size: tuple[int, int], rng: np.random.Generator) -> list[Image.Image]:
    """Parts of photographs in the wheels of scikit-image and scikit-learn."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--python-version", "3.11", "-d", scratch, *WHEELS], check=True)
        for wheel in sorted(Path(scratch).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(set(archive.namelist()) & set(PHOTOGRAPHS)):
                    found.append(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
    views = [(1.0, (0.5, 0.5)), *((rng.uniform(1, 3), tuple(rng.random(2))) for _ in range(VIEWS - 1))]
    return [crop_image(photograph, *size, zoom, place) for photograph in found for zoom, place in views]


# ---- measures


def auroc(usual: np.ndarray, unusual: np.ndarray) -> float:
    """Probability that an unusual picture's value is above a usual one's; 0.5 is chance."""
    return float((unusual[:, None] > usual).mean() + 0.5 * (unusual[:, None] == usual).mean())


def jacobian(function: Callable[[np.ndarray], np.ndarray], point: np.ndarray, step: float = 2e-2) -> np.ndarray:
    """By five-point differences, `[outputs, inputs]`, of a function of batches at one point `[1, ...]`."""
    moves = step * np.eye(point.size, dtype=np.float32).reshape(-1, *point.shape[1:])
    near, far = (
        (function(point + times * moves).astype(np.float64) - function(point - times * moves)) / (2 * times * step)
        for times in (1, 2)
    )
    return ((4 * near - far) / 3).reshape(point.size, -1).T


def tiny_flow() -> STARFlow:
    """A random flow over 4x4 latents of 2 channels."""
    mx.random.seed(0)
    flow = STARFlow(FlowConfig(4, 2, 1, 64, [1, 1, 1], use_softplus=True, soft_clip=4.0, use_final_norm=True))
    for block in flow.blocks:
        block.proj_out.weight = 0.1 * mx.random.normal(block.proj_out.weight.shape)
    return flow


def main(arguments: list[str] | None = None) -> None:
    parts = ("exactness", "round_trip", "prompt_fit", "best_of_eight", "anomalies", "edits")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sprites, as scene_data.py writes it; fetched if missing")
    parser.add_argument("pictures", type=Path, help="folder for the pictures")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--evaluator", type=Path, help="what judges samples: evaluator.pt of embedded_model.py")
    parser.add_argument("--count", type=int, default=COUNT, help="scenes of either kind, 20 or more (%(default)s)")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of best_of_eight (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART")
    args = parser.parse_args(arguments)
    print(f"machine: {platform.platform()}, {platform.processor() or platform.machine()}, MLX {mx.__version__}")
    report = Report(args.data, args.pictures, args.model, args.evaluator, count=args.count, prompts=args.prompts)
    for part in args.only:
        began = time.perf_counter()
        print(f"\n# {part.replace('_', ' ')}")
        getattr(report, part)()
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
