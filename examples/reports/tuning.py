"""What tuning takes, and whether ranking the blocks beforehand would save any of it (arXiv 2505.12849).

    python examples/reports/tuning.py demo runs/latent/model --samples 2

For each block of a model: the paper's convergence ranking metric (CRM) and its initial guessing metrics (IGM, of the
noise and of zeros as the first guess), how much of the distance to the data one Jacobi sweep leaves, from the noise,
and what the block really needs: evaluations of a window over all of its tokens. Then, for plans of fewest seconds and
of fewest evaluations, what the search for windows takes: from the narrowest window on, from the widest on, and from
the widest on for those blocks alone that a ranking calls easy; and what the plan costs then.

CRM is ||a|| ||W_s|| + ||W_m||, with the mean over samples a of x / sigma, tokens by channels, and the rows of the
output projection for log sigma and for mu; IGM is the norm of the mean of F(guess) - x, one sweep from the guess. Norms
are spectral. Blocks are easy by CRM where theirs is below the mean, and by a sweep where it leaves less than half.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow.bench.trials import PROMPTS, Task, prepare
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.quantization import dequantize_module
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.sampling import JacobiSettings, RollingSettings, SamplingOptions, SequentialSettings
from mlx_starflow.sampling.trials import COSTS, Trial, TunedSample, attempt, cheapest, tuned_samples, windows
from mlx_starflow.sampling.tuning import DEEP_SHARE, OTHERS_SHARE

TOLERANCE = 1e-2
EASY = 0.5


def task(model: str, samples: int) -> Task:
    """What is sampled: a model's own prompts or, of a flow alone, embeddings of one that lie beside it."""
    stored = Path(model) / "text.safetensors"
    if not stored.is_file():
        return prepare(model, PROMPTS[:samples]).task
    flow = load_flow(model)
    assert isinstance(flow, STARFlow)
    dequantize_module(flow)
    texts, config = mx.load(str(stored)), flow.config
    z = draw_noise(range(samples), (config.img_size, config.img_size, config.channel_size))
    text = mx.repeat(texts["text"], samples, axis=0)
    return Task(flow, mx.array(z), text, texts["null"], config.cfg or 2.5)


def measures(samples: list[TunedSample], index: int) -> dict[str, float]:
    """CRM, IGM and what one sweep leaves, of one block."""
    scaled, left = [], []
    off: dict[str, list[mx.array]] = {"IGM, noise": [], "IGM, zeros": []}
    block = samples[0].flow.blocks[index]
    for one in samples:
        x, z = one.data[index], one.noise[index]
        _, log_sigma = one.guided.predict(index, x)
        scaled.append(block.permute(x * mx.exp(-log_sigma)))
        for name, guess in (("IGM, noise", z), ("IGM, zeros", mx.zeros_like(z))):
            # The first token is known without a guess.
            own = block.permute(guess)
            guess = block.unpermute(mx.concatenate([block.permute(x)[:, :1], own[:, 1:]], axis=1))
            mu, log_sigma = one.guided.predict(index, guess)
            swept = z * mx.exp(log_sigma) + mu
            off[name].append(block.permute(swept - x))
            if name == "IGM, noise":
                left.append(float(mx.sqrt(mx.square(swept - x).mean() / mx.square(guess - x).mean())))

    def norm(matrices: list[mx.array]) -> float:
        return float(np.linalg.norm(np.array(mx.concatenate(matrices).mean(axis=0), np.float32), 2))

    scale, mean = (float(np.linalg.norm(w, 2)) for w in np.split(np.array(block.proj_out.weight, np.float32), 2))
    crm = norm(scaled) * scale + mean
    return {"CRM": crm, **{name: norm(each) for name, each in off.items()}, "sweep": float(np.mean(left))}


def search(samples: list[TunedSample], index: int, tolerance: float, least: str, widest_first: bool) -> list[Trial]:
    """The windows that tuning tries in one order."""
    order = windows(samples[0].length(index), "evaluations" if widest_first else "seconds")
    trials: list[Trial] = []
    worse, best = 0, float("inf")
    for window in order:
        trials.append(attempt(index, samples, RollingSettings(window, tolerance)))
        cost = trials[-1].cost(least)
        worse, best = (0, cost) if cost < best else (worse + 1, best)
        if worse == 2:
            break
    return trials


def report(model: str, count: int) -> None:
    made = task(model, count)
    samples = list(tuned_samples(made.flow, made.z, made.text, made.null_text, SamplingOptions(made.guidance)))
    active = list(samples[0].guided.active())
    for index in active:  # to warm up
        attempt(index, samples[:1], RollingSettings(8, TOLERANCE))
    found = {index: measures(samples, index) for index in active}
    print(f"\n## {model}: {count} samples, guidance {made.guidance:g}\n")
    print("| block | tokens | CRM | IGM, noise | IGM, zeros | left by a sweep | evaluations, all tokens at once |")
    print("|---|---|---|---|---|---|---|")
    for index, own in found.items():
        whole = attempt(index, samples, RollingSettings(samples[0].length(index), TOLERANCE / 10))
        figures = [f"{own[name]:.1f}" for name in ("CRM", "IGM, noise", "IGM, zeros")] + [f"{own['sweep']:.2f}"]
        print(f"| {index} | {samples[0].length(index)} | {' | '.join(figures)} | {whole.evaluations / count:.1f} |")
    mean = np.mean([own["CRM"] for own in found.values()])
    tough = {
        "by CRM": [index for index, own in found.items() if own["CRM"] > mean],
        "by a sweep": [index for index, own in found.items() if own["sweep"] > EASY],
    }
    print("\n| plan of fewest | order of windows | search: evaluations | seconds | plan: evaluations | seconds |")
    print("|---|---|---|---|---|---|")
    for least in COSTS:
        rows: dict[str, list[float]] = {}
        for index in active:
            tolerance = (DEEP_SHARE if index == max(active) else OTHERS_SHARE) * TOLERANCE
            others = [
                attempt(index, samples, s) for s in (SequentialSettings(), JacobiSettings(threshold=tolerance**2))
            ]
            both = [search(samples, index, tolerance, least, widest_first) for widest_first in (False, True)]
            orders = {"narrowest first": 0, "widest first": 1}
            orders |= {name: int(index not in blocks) for name, blocks in tough.items()}
            for name, which in orders.items():
                trials = both[which]
                right = [each for each in (*others, *trials) if each.residual <= 2 * tolerance]
                best = cheapest(right, least)
                spent = [sum(trial.evaluations for trial in trials), sum(trial.seconds for trial in trials)]
                row = [*spent, best.evaluations, best.seconds]
                rows[name] = [a + b for a, b in zip(rows.get(name, [0] * 4), row, strict=True)]
        for name, (evaluations, seconds, plan_evaluations, plan_seconds) in rows.items():
            figures = f"{evaluations:.0f} | {seconds:.2f} | {plan_evaluations:.0f} | {plan_seconds:.2f}"
            print(f"| {least} | {name} | {figures} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo"], metavar="MODEL")
    parser.add_argument("--samples", type=int, default=2)
    args = parser.parse_args()
    for model in args.models:
        report(model, args.samples)


if __name__ == "__main__":
    main()
