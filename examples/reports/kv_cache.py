"""What keys and values in 8 and 4 bits cost: exact likelihood, certificates, evaluations, bytes.

    python examples/reports/kv_cache.py                          # the embedded model, and the flow of tests/data
    python examples/reports/kv_cache.py --shapes runs/shapes     # and what moving_shapes.py has trained
    python examples/reports/kv_cache.py --recent 1               # nearly nothing stays dense

The likelihood of a picture is one parallel pass, which caches nothing. Here it is computed as samplers read: token
after token, and in windows of 64, each predicted from the true tokens before it through the cache. It is taken of
samples of the flow itself, with the training noise in them; all rows see the same. The guided flow has a likelihood
too: that is taken of guided samples, in windows. Certificates are those of guided samples, by the exact flow;
evaluations are means over the samples, deep block first.

    python examples/reports/kv_cache.py --parts                  # guidance in the first part of the tokens alone

How much of what guidance does is left then: of the log-likelihood ratio of the prompt to the empty prompt, in nats per
dimension, and how far samples are from guided ones, as a share of how far unguided ones are; 0 is as with guidance.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from precision import TRAINED, Samples, embedded, trained

from mlx_starflow import load, load_flow
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.models.flow import Flow, frame_count
from mlx_starflow.sampling import (
    Certificate,
    GuidedFlow,
    RollingSettings,
    SamplingOptions,
    SamplingTrace,
    cache,
    certify,
    sample,
)
from mlx_starflow.sampling.guidance import Guidance
from mlx_starflow.sampling.sampler import invert_block

WINDOW = RollingSettings.window


@dataclass
class Case:
    """A flow, and what it is measured on: noise of its samples, their conditions and guidance; data for the NLL."""

    flow: Flow
    z: mx.array
    text: mx.array
    null: mx.array
    guidance: float
    data: mx.array
    data_text: mx.array

    @cached_property
    def guided_data(self) -> mx.array:
        """Samples with guidance, of conditions `data_text`."""
        noise = mx.array(draw_noise(range(2000, 2000 + len(self.data)), self.data.shape[1:]))
        return sample(self.flow, noise, self.data_text, self.null, self.guidance)

    def guided_nll(self, kv_bits: cache.KVBits) -> tuple[np.ndarray, int]:
        return cached_nll(self.flow, self.guided_data, self.data_text, kv_bits, WINDOW, self.null, self.guidance)


def cached_nll(
    flow: Flow,
    x: mx.array,
    text: mx.array,
    kv_bits: cache.KVBits,
    step: int,
    null: mx.array | None = None,
    guidance: float = 0.0,
) -> tuple[np.ndarray, int]:
    """NLL `[B]` of data in nats per dimension, `step` tokens at a time through the caches; their largest's bytes."""
    guided = GuidedFlow(flow, x.shape, text, null, SamplingOptions(guidance, kv_bits=kv_bits))
    tokens = flow.tokens(x)
    frames, log_det, held = frame_count(x.shape), mx.zeros(len(x)), 0
    for index, block in enumerate(flow.blocks):
        if block.is_identity:
            continue
        inputs = block.permute(tokens, frames)
        decoder = guided.decoder(index, *tokens.shape[:2])
        decoder.begin(inputs)
        parts = [block.unpredicted(inputs[:, : decoder.first])] if decoder.first else []
        for start in range(decoder.first, inputs.shape[1], step):
            parts.append(decoder.predict(start, min(start + step, inputs.shape[1])))
            mx.eval(parts[-1])
        mu, log_sigma = (mx.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        tokens = block.unpermute((inputs - mu) * mx.exp(-log_sigma), frames)
        log_det = log_det - block.unpermute(log_sigma, frames).reshape(len(x), -1).mean(1)
        held = max(held, decoder.network.cache_bytes)
    nll = (0.5 * mx.square(tokens)).reshape(len(x), -1).mean(1) - log_det
    return np.array(nll).astype(np.float64), held


def pictures(samples: Samples, count: int) -> Case:
    flow = samples.make()
    data, text = samples.data(flow)
    return Case(flow, samples.z, samples.text, samples.null, samples.guidance, data[:count], text[:count])


def moving_shapes(folder: Path, count: int) -> Case:
    flow = load_flow(folder, dtype="float32")
    prompts = ["a red circle moves left", "a blue square moves up", "a green triangle moves right"]
    text = load("demo").encode_prompts([*prompts, ""]).astype(mx.float32)
    config = flow.config
    shape = (config.video[0], config.img_size, config.img_size, config.channel_size)
    noise = mx.array(draw_noise(range(count + len(prompts)), shape))
    own = text[mx.arange(count) % len(prompts)]
    data = sample(flow, noise[:count], own)
    return Case(flow, noise[count:], text[:-1], text[-1:], 1.0, data, own)


def rows(case: Case) -> Iterator[list[str]]:
    nlls = [partial(cached_nll, case.flow, case.data, case.data_text, step=step) for step in (1, WINDOW)]
    exact = [(nll, *nll(kv_bits=0)) for nll in (*nlls, case.guided_nll)]
    for bits in cache.KV_BITS:
        cells = [f"{cache.kv_name(bits)} bits" if bits else "as computed"]
        for compute, dense, size in exact:
            nll, held = compute(kv_bits=bits) if bits else (dense, size)
            change = nll - dense
            error = change.std(ddof=1) / np.sqrt(len(change))
            cells.append(f"{change.mean():+.1e} +- {error:.0e}, {np.abs(change).max():.0e}" if bits else "")
        cells.append(f"{held / size:.2f}")
        for method in ("sequential", "rolling"):
            evaluations, certificates = np.zeros(len(case.flow.blocks)), []
            for index in range(len(case.z)):
                one, trace = slice(index, index + 1), SamplingTrace()
                task = (case.z[one], case.text[one], case.null, case.guidance)
                x = sample(case.flow, *task, method, kv_bits=bits, trace=trace)
                certificates.append(certify(case.flow, x, *task))
                evaluations += trace.evaluations
            worst = Certificate.worst(certificates)
            cells.append(f"{worst.max:.0e}, {worst.rms:.0e}")
        counts = (evaluations / len(case.z)).round(1)
        yield [*cells, " + ".join(f"{count:g}" for count in counts)]


@dataclass
class FirstPart(Guidance):
    """Guidance of the first `share` of a block's tokens."""

    share: float = 1.0

    def at(self, start: int, count: int, total: int) -> mx.array:
        inside = mx.arange(start, start + count) < self.share * total
        return self.weight * inside.astype(mx.float32)[None, :, None]


def partly_guided(case: Case, share: float) -> mx.array:
    """Samples of the noise and conditions of `Case.guided_data`."""
    flow, shape = case.flow, case.data.shape
    guided = GuidedFlow(flow, shape, case.data_text, case.null, SamplingOptions(case.guidance))
    guided.guidance = FirstPart(guided.guidance.mode, case.guidance, share=share)
    x = flow.noise_tokens(mx.array(draw_noise(range(2000, 2000 + len(case.data)), shape[1:])))
    for index in guided.active():
        x = invert_block(guided.decoder(index, *x.shape[:2]), x, RollingSettings())
    return flow.latents(x, shape)


def parts(case: Case) -> Iterator[list[str]]:
    """How much of guidance is left when only the first part of the tokens is guided."""

    def ratio(x: mx.array) -> float:
        null = mx.broadcast_to(case.null, case.data_text.shape)
        return float((case.flow(x, null).nll() - case.flow(x, case.data_text).nll()).mean())

    made = {share: partly_guided(case, share) for share in (1.0, 0.75, 0.5, 0.25, 0.0)}
    ratios = {share: ratio(x) for share, x in made.items()}
    for share, x in made.items():
        off, most = (float(mx.sqrt(mx.square(each - made[1.0]).mean())) for each in (x, made[0.0]))
        left = (ratios[share] - ratios[0.0]) / (ratios[1.0] - ratios[0.0])
        yield [f"{share:.0%}", f"{ratios[share]:.4f}", f"{left:.0%}", f"{off / most:.2f}"]


def table(titles: list[str], lines: Iterator[list[str]]) -> None:
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for cells in lines:
        print("| " + " | ".join(cells) + " |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8, help="for the likelihood")
    parser.add_argument("--shapes", type=Path, help="folder of moving_shapes.py")
    parser.add_argument("--recent", type=int, default=cache.RECENT, help="positions that are not quantized yet")
    parser.add_argument("--parts", action="store_true", help="measure guidance in a part of the tokens instead")
    args = parser.parse_args(arguments)
    cache.RECENT = args.recent
    cases = {"the embedded model": lambda: pictures(embedded("demo", 2, args.pictures), args.pictures)}
    if TRAINED.is_dir():
        cases["256 tokens, guidance 2.5"] = lambda: pictures(trained(args.pictures), args.pictures)
    if args.shapes:
        cases["moving shapes"] = lambda: moving_shapes(args.shapes, args.pictures)
    titles = ["keys and values", "NLL, token by token", f"NLL, windows of {WINDOW}", "guided NLL", "cache",
              "sequential", "window", "evaluations"]  # fmt: skip
    for name, make in cases.items():
        if args.parts:
            print(f"\n{name}: guidance in the first part of the tokens\n")
            table(["guided", "prompt against none", "left", "distance"], parts(make()))
        else:
            print(f"\n{name}: NLL is the change in nats per dimension and the largest; |f(x) - z|, and its RMS.\n")
            table(titles, rows(make()))


if __name__ == "__main__":
    main()
