"""A flow over text and an ordinary transformer of the same size, on the same text for the same steps.

    python examples/reports/text_flow.py text.txt runs/text --only flow
    python examples/reports/text_flow.py text.txt runs/text --only transformer
    python examples/reports/text_flow.py text.txt runs/text

docs/text.md is about the New Testament in the King James Version, whose copyright has expired: in Debian

    apt-get install bible-kjv && bible -l100 mat1:1-rev22:21 > bible.txt
    python examples/reports/text_flow.py bible.txt runs/text --verses

With --only one of them is trained; Ctrl-C saves, and the same command resumes. Without it what is not trained yet is
trained, and both are measured on the held-out part of the text: bits per character, and how well they fill gaps, the
flow from both sides and from what stands before a gap, the transformer from what stands before it, or by choosing of
several such continuations the one that it likes best with what follows. OUT gets figures.json and samples.txt;
docs/text.md shows them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_starflow.likelihood.text import score_characters
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.rope import line_frequencies
from mlx_starflow.models.text_flow import TextFlow, TextFlowConfig
from mlx_starflow.models.transformer import RMSNorm, TransformerConfig, TransformerLayer
from mlx_starflow.pipelines.text import BLANK, TextPipeline
from mlx_starflow.sampling import JacobiSettings, RollingSettings, SamplingTrace, certify, sample
from mlx_starflow.sampling.gaps import fill_gaps
from mlx_starflow.sampling.methods import Method
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.text_windows import TextWindows, split_text
from mlx_starflow.training.loop.objective import Batch, Metrics
from mlx_starflow.training.loop.text_objective import text_loss, text_nats
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign
from mlx_starflow.training.recipes.text_flow import AHEAD

HELD_OUT = 0.05
BATCH = 16
COLD = 0.05
"""Temperature at which the flow takes the most likely character, nearly always."""


class Transformer(nn.Module):
    """An ordinary transformer over characters, with the layers and positions of the flow's blocks."""

    def __init__(self, characters: int, length: int, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(characters + 1, config.channels)
        self.pos_embed = 0.01 * mx.random.normal((length, config.channels))
        self.layers = [TransformerLayer(config) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.channels)
        self.head = nn.Linear(config.channels, characters)

    def __call__(self, text: mx.array) -> mx.array:
        """Characters `[B, T]` -> log-probabilities of each and of the next one, `[B, T + 1, V]`."""
        start = mx.full((text.shape[0], 1), self.head.weight.shape[0], text.dtype)
        h = self.embedding(mx.concatenate([start, text], axis=1))
        h = h + mx.concatenate([self.pos_embed, self.pos_embed[-1:]])[: h.shape[1]]
        frequencies = line_frequencies(self.config.head_dim, h.shape[1])
        for layer in self.layers:
            h = layer(h, frequencies)
        logits = self.head(self.norm(h))
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def transformer_nats(model: Transformer, batch: Batch) -> mx.array:
    """-log p(text) of each sample, `[B]`, in nats a character."""
    text = batch["characters"]
    found = mx.take_along_axis(model(text[:, :-1]), text[..., None].astype(mx.int32), axis=-1)
    return -found[..., 0].mean(axis=-1)


def transformer_loss(model: Transformer, batch: Batch) -> tuple[mx.array, Metrics]:
    loss = transformer_nats(model, batch).mean()
    return loss, {"bpc": loss / math.log(2)}


def verses(printed: str) -> str:
    """The verses, one a line and without their numbers, of what the program `bible` prints."""
    found: list[str] = []
    goes_on = False
    for line in printed.splitlines():
        if verse := re.match(r" +\d+ (.*)", line):
            found.append(verse[1].strip())
        elif goes_on and line.strip() and not re.fullmatch(r"[\w ]+ \d+", line):
            found[-1] += " " + line.strip()
        goes_on = bool(verse) or (goes_on and bool(line.strip()))
    return "\n".join(found) + "\n"


def size_of(model: nn.Module) -> int:
    return sum(weight.size for weight in parameters(model).values())


def new_models(args: argparse.Namespace, alphabet: str) -> tuple[TextFlow, Transformer]:
    """Both, untrained: the transformer has as many layers, and is as much wider as makes it as large."""
    config = TextFlowConfig(
        alphabet=alphabet,
        length=args.length,
        channels=args.channels,
        layers_per_block=args.layers,
        components=[len(alphabet)] + [0] * (len(args.layers) - 1),
        head_dim=args.channels // 4,
        ahead=AHEAD,
    )
    mx.random.seed(0)
    flow = TextFlow(config)
    layers, models = sum(args.layers), []
    for dim in range(args.channels // 4, args.channels // 2, 2):
        sizes = TransformerConfig(
            channels=4 * dim, num_layers=layers, head_dim=dim, num_heads=4, num_kv_heads=4, norm_type="rms_norm",
            use_qk_norm=True,
        )  # fmt: skip
        models.append(Transformer(len(alphabet), args.length, sizes))
        if size_of(models[-1]) > size_of(flow):
            break
    return flow, min(models, key=lambda model: abs(size_of(model) - size_of(flow)))


def train(args: argparse.Namespace, name: str, model: nn.Module, data: TextWindows, held_out: TextWindows) -> None:
    """Train one of them, and write its weights."""
    every = max(1, args.steps // 10)
    config = TrainingConfig(
        steps=args.steps, batch_size=args.batch_size, lr=args.lr, ema=args.ema, log_every=max(1, every // 20),
        validate_every=every,
    )  # fmt: skip
    loss, nats = (text_loss, text_nats) if name == "flow" else (transformer_loss, transformer_nats)
    began = time.monotonic()
    trainer = Trainer(
        model, data, config, args.out / name / "training", loss=loss, validation=held_out,
        nll=partial(_without_constant, nats), name=name,
    )  # fmt: skip
    assign(model, trainer.run())
    save_model(args.out / name, parameters(model), _config(model))
    print(f"{name}: {size_of(model)} weights, {time.monotonic() - began:.0f} s")


def _without_constant(nats, model, batch):
    return nats(model, batch) - 0.5 * math.log(2 * math.pi)


def _config(model: nn.Module) -> dict[str, object]:
    if isinstance(model, TextFlow):
        return {"model_type": "text_flow", **model.config.to_dict()}
    return {"model_type": "transformer"}


def load_weights(folder: Path, model: nn.Module) -> None:
    """Give a model the weights that were trained."""
    model.load_weights(str(folder / "model.safetensors"))


def transformer_bits(model: Transformer, windows: np.ndarray) -> float:
    """Bits per character of windows `[N, T]`."""
    parts = np.array_split(windows, max(1, len(windows) // BATCH))
    nats = [np.array(transformer_nats(model, {"characters": mx.array(part)})) for part in parts]
    return float(np.concatenate(nats).mean() / math.log(2))


def gap_bits(flow: TextFlow, texts: np.ndarray, gap: slice, draws: int) -> np.ndarray:
    """Bits per character of what stands in a gap of each text, given the rest of it, `[B]`: the importance-weighted
    bound of so many draws, which is above what the flow needs to fill the gap so."""
    hidden = [gap.start <= place < gap.stop for place in range(texts.shape[1])]
    reading, found = flow.filling(hidden), []
    for draw in range(draws):
        noise = mx.random.normal((*texts.shape, flow.config.size), key=mx.random.key(draw))
        parts = reading.log_weights(mx.array(texts), noise)[:, gap]
        found.append(np.array(parts.sum(axis=1), np.float64))
    weighted = np.logaddexp.reduce(found, axis=0) - math.log(draws)
    return -weighted / ((gap.stop - gap.start) * math.log(2))


def filled_by(flow: TextFlow, texts: np.ndarray, gap: slice, temperature: float) -> np.ndarray:
    """What a flow fills a gap of texts `[B, T]` with, given the rest of them."""
    hidden = [gap.start <= place < gap.stop for place in range(texts.shape[1])]
    noise = mx.random.normal((2, *texts.shape, flow.config.size), key=mx.random.key(gap.start))
    reading = flow.filling(hidden).at_temperature(temperature)
    filled = fill_gaps(reading, flow.codebook.encode(mx.array(texts), noise[0]), noise[1], hidden)
    return np.array(flow.codebook.decode(filled.x))[:, gap]


def continued(model: Transformer, texts: np.ndarray, count: int, temperature: float, seed: int = 0) -> np.ndarray:
    """Texts `[B, T]` with `count` more characters; temperature 0: the most likely ones."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scores = np.array(model(mx.array(texts))[:, -1], np.float64)
        if temperature:
            scores = scores / temperature + rng.gumbel(size=scores.shape)
        texts = np.concatenate([texts, scores.argmax(axis=1)[:, None].astype(np.int32)], axis=1)
    return texts


def best_continued(model: Transformer, texts: np.ndarray, gap: slice, candidates: int) -> np.ndarray:
    """Of several continuations up to the end of the gap the one that the transformer likes best with what follows."""
    rows = np.repeat(texts, candidates, axis=0)
    length = gap.stop - gap.start
    filled = np.concatenate([continued(model, rows[:, : gap.start], length, 0.7), rows[:, gap.stop :]], axis=1)
    nats = np.array(transformer_nats(model, {"characters": mx.array(filled)})).reshape(-1, candidates)
    chosen = filled.reshape(-1, candidates, filled.shape[1])[np.arange(len(texts)), nats.argmin(axis=1)]
    return chosen[:, gap]


def mean_of(values: np.ndarray) -> tuple[float, float]:
    """The mean of one value a text, and its standard error."""
    values = values.astype(np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def fill_figures(
    flow: TextFlow, transformer: Transformer, windows: np.ndarray, length: int, candidates: int, draws: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """Gaps of `length` characters, somewhere in the middle half of each window, filled by both; see `compare`.

    Returns:
        Of each way of filling them bits per character, and the shares of gaps and of characters that are as they were,
        each with its standard error; bits also as the difference from the flow's that reads both sides.
    """
    rng, size = np.random.default_rng(length), windows.shape[1]
    bits: dict[str, list[np.ndarray]] = {}
    same: dict[str, list[np.ndarray]] = {}
    for texts in np.array_split(windows, max(1, len(windows) // BATCH)):
        start = int(rng.integers(size // 4, 3 * size // 4 - length + 1))
        gap = slice(start, start + length)
        left = texts[:, : gap.stop]
        log_probabilities = np.array(transformer(mx.array(left[:, :-1]))[:, gap.start :])
        picked = np.take_along_axis(log_probabilities, left[:, gap, None].astype(np.int64), axis=-1)[..., 0]
        for name, found in (
            ("flow", gap_bits(flow, texts, gap, draws)),
            ("flow, left side alone", gap_bits(flow, left, gap, draws)),
            ("transformer", -picked.mean(axis=1) / math.log(2)),
        ):
            bits.setdefault(name, []).append(found)
        for name, filled in (
            ("flow", filled_by(flow, texts, gap, COLD)),
            ("flow, left side alone", filled_by(flow, left, gap, COLD)),
            ("transformer", continued(transformer, texts[:, : gap.start], length, 0.0)[:, gap]),
            ("transformer, best of several", best_continued(transformer, texts, gap, candidates)),
        ):
            same.setdefault(name, []).append(filled == texts[:, gap])
    figures: dict[str, dict[str, tuple[float, float]]] = {}
    for name, parts in same.items():
        rows = np.concatenate(parts)
        figures[name] = {"gaps": mean_of(rows.all(axis=1)), "characters": mean_of(rows.mean(axis=1))}
    needed = {name: np.concatenate(parts) for name, parts in bits.items()}
    for name, values in needed.items():
        figures[name]["bits"] = mean_of(values)
        figures[name]["bits above the flow's"] = mean_of(values - needed["flow"])
    return figures


def sampling_figures(flow: TextFlow) -> dict[str, dict[str, float]]:
    """Evaluations, seconds and certificate of ways of sampling one text."""
    z = mx.array(draw_noise([0], (flow.config.length, flow.config.size)))
    methods: dict[str, Method] = {
        "sequential": "sequential", "jacobi": JacobiSettings(), "rolling, 16 tokens": RollingSettings(window=16),
    }  # fmt: skip
    figures = {}
    for name, method in methods.items():
        mx.eval(sample(flow, z, method=method))
        trace, began = SamplingTrace(), time.perf_counter()
        x = sample(flow, z, method=method, trace=trace)
        mx.eval(x)
        seconds = time.perf_counter() - began
        figures[name] = {
            "evaluations": sum(trace.evaluations), "seconds": seconds, "certificate": certify(flow, x, z).max,
        }  # fmt: skip
    return figures


def compare(args: argparse.Namespace, flow: TextFlow, transformer: Transformer, held_out: TextWindows) -> None:
    """Measure both, and write figures.json and samples.txt."""
    windows = held_out.characters[: held_out.order.count * held_out.length].reshape(-1, held_out.length)
    windows = windows[np.linspace(0, len(windows) - 1, min(args.windows, len(windows))).astype(int)]
    score = score_characters(flow, windows.reshape(-1), draws=args.draws)
    figures: dict[str, object] = {
        "weights": {"flow": size_of(flow), "transformer": size_of(transformer)},
        "flow": score.to_dict(),
        "transformer": {"bits_per_character": transformer_bits(transformer, windows)},
        "sampling": sampling_figures(flow),
    }
    figures["gaps"] = {
        length: fill_figures(
            flow, transformer, np.tile(windows, (args.places, 1)), length, args.candidates, args.gap_draws
        )
        for length in args.gaps
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    pipe = TextPipeline("flow", flow)
    lines = []
    for temperature in (1.0, 0.7):
        made = pipe.generate(length=args.sample_length, texts=2, seed=0, temperature=temperature, progress=False)
        lines += [f"temperature {temperature}:", *made.texts, ""]
    for window in windows[:6]:
        text, middle = flow.text(mx.array(window)), held_out.length // 2
        gapped = text[: middle - 4] + BLANK * 8 + text[middle + 4 :]
        made = pipe.fill(gapped, texts=3, seed=0, temperature=0.5, progress=False)
        fills = [each[middle - 4 : middle + 4] for each in made.texts]
        lines += [repr(gapped), f"was {text[middle - 4 : middle + 4]!r}, filled with {fills}", ""]
    (args.out / "samples.txt").write_text("\n".join(lines))
    print(json.dumps(figures, indent=1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--verses", action="store_true", help="the file is what the program bible printed")
    parser.add_argument("--only", choices=["flow", "transformer"])
    parser.add_argument("--length", type=int, default=128, help="characters of a window")
    parser.add_argument("--channels", type=int, default=128, help="width of the flow, a multiple of 8")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 1], help="of each block of the flow")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--draws", type=int, default=64, help="of the codebook's noise, for the bounds")
    parser.add_argument("--gaps", type=int, nargs="+", default=[2, 4, 8, 16], help="characters that are hidden")
    parser.add_argument("--places", type=int, default=1, help="gaps in each window, one at a time")
    parser.add_argument("--gap-draws", type=int, default=16, help="of the noise, for the bound of what is hidden")
    parser.add_argument("--windows", type=int, default=160, help="held-out ones that both are measured on")
    parser.add_argument("--candidates", type=int, default=8, help="continuations that the transformer chooses from")
    parser.add_argument("--sample-length", type=int, default=384)
    args = parser.parse_args(arguments)

    text = verses(args.text.read_text()) if args.verses else args.text.read_text()
    alphabet = "".join(sorted(set(text)))
    flow, transformer = new_models(args, alphabet)
    characters = np.array(flow.characters(text))
    trained, held = split_text(characters, HELD_OUT)
    data = partial(TextWindows, length=args.length, size=flow.config.size)
    models: dict[str, nn.Module] = {"flow": flow, "transformer": transformer}
    for name, model in models.items():
        if args.only in (None, name) and not (args.out / name / "config.json").exists():
            train(args, name, model, data(trained), data(held, gaps=0.0))
    if args.only is None:
        for name, model in models.items():
            load_weights(args.out / name, model)
        compare(args, flow, transformer, data(held, gaps=0.0))


if __name__ == "__main__":
    main()
