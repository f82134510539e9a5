"""What keys and values in 8 and 4 bits cost: exact likelihood, certificates, evaluations, bytes.

    python examples/reports/kv_cache.py                          # the embedded model, and the flow of tests/data
    python examples/reports/kv_cache.py --shapes runs/shapes     # and what moving_shapes.py has trained
    python examples/reports/kv_cache.py --recent 1               # nearly nothing stays dense

The likelihood of a picture is one parallel pass, which caches nothing. Here it is computed as samplers read: token
after token, and in windows of 64, each predicted from the true tokens before it through the cache. It is taken of
samples of the flow itself, with the training noise in them; all rows see the same. Certificates are those of guided
samples, by the exact flow; evaluations are means over the samples, deep block first.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
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


def cached_nll(flow: Flow, x: mx.array, text: mx.array, kv_bits: int, step: int) -> tuple[np.ndarray, int]:
    """NLL `[B]` of data in nats per dimension, `step` tokens at a time through the caches; their largest's bytes."""
    guided, tokens = GuidedFlow(flow, x.shape, text, None, SamplingOptions(kv_bits=kv_bits)), flow.tokens(x)
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
    exact = {step: cached_nll(case.flow, case.data, case.data_text, 0, step) for step in (1, WINDOW)}
    for bits in cache.KV_BITS:
        cells = [f"{bits} bits" if bits else "as computed"]
        for step, (dense, size) in exact.items():
            nll, held = cached_nll(case.flow, case.data, case.data_text, bits, step) if bits else (dense, size)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8, help="for the likelihood")
    parser.add_argument("--shapes", type=Path, help="folder of moving_shapes.py")
    parser.add_argument("--recent", type=int, default=cache.RECENT, help="positions that are not quantized yet")
    args = parser.parse_args(arguments)
    cache.RECENT = args.recent
    cases = {"the embedded model": lambda: pictures(embedded("demo", 2, args.pictures), args.pictures)}
    if TRAINED.is_dir():
        cases["256 tokens, guidance 2.5"] = lambda: pictures(trained(args.pictures), args.pictures)
    if args.shapes:
        cases["moving shapes"] = lambda: moving_shapes(args.shapes, args.pictures)
    titles = ["keys and values", "NLL, token by token", f"NLL, windows of {WINDOW}", "cache", "sequential", "window",
              "evaluations"]  # fmt: skip
    for name, make in cases.items():
        print(f"\n{name}: NLL is the change in nats per dimension and the largest; |f(x) - z|, and its RMS.\n")
        print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
        for cells in rows(make()):
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
