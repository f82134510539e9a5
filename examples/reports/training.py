"""Training throughput and memory, MLX beside the PyTorch reference doing the same work on the same CPU.

    python examples/reports/training.py            # needs PyTorch: pip install '.[torch]'

One step is: forward, backward, clipping and AdamW on a flow of the embedded model's sizes. Every way of doing it runs
in a process of its own, and the processes take turns, so that a busy machine slows all of them alike; the table has the
median of the turns. Memory is how much the process's peak grew after the model was there. Then: where MLX's time goes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

WAYS = ("mlx", "mlx, layers checkpointed", "mlx, not compiled", "pytorch", "pytorch, layers checkpointed")


def config(channels: int) -> Any:
    from mlx_starflow.training.recipes.presets import get_preset

    return replace(get_preset("demo").flow_config(), channels=channels, top_block_channels=None)


def arrays(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    latents, noise = rng.standard_normal((2, batch, 16, 16, 4), dtype=np.float32)
    return {"latents": latents, "noise": noise, "text": rng.standard_normal((batch, 24, 256), dtype=np.float32)}


def mlx_step(channels: int, batch: int, checkpoint: bool, compiled: bool) -> Callable[[], None]:
    import mlx.core as mx

    from mlx_starflow.models.starflow import STARFlow
    from mlx_starflow.training.config import TrainingConfig
    from mlx_starflow.training.loop import distributed
    from mlx_starflow.training.loop.objective import batch_loss
    from mlx_starflow.training.loop.step import StepMaker

    if not compiled:
        mx.disable_compile()
    flow = STARFlow(config(channels))
    steps = StepMaker(
        flow,
        lambda flow, batch: batch_loss(flow, batch, checkpoint),
        None,
        TrainingConfig(steps=1, batch_size=batch, ema=0.0),
        distributed.world(),
    )
    data = arrays(batch)
    mx.eval(flow.parameters(), steps.optimizer.state)
    return lambda: steps(data, 0, 1e-4, 0.0)


def torch_step(channels: int, batch: int, checkpoint: bool) -> Callable[[], None]:
    import torch
    from torch.utils.checkpoint import checkpoint as recomputed

    from mlx_starflow.reference.starflow import STARFlow

    torch.set_num_threads(1)
    flow = STARFlow(config(channels))
    if checkpoint:
        for block in flow.blocks:
            for layer in block.attn_blocks:
                forward = layer.forward
                layer.forward = lambda *a, forward=forward: recomputed(forward, *a, use_reentrant=False)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    data = {name: torch.from_numpy(array) for name, array in arrays(batch).items()}

    def step() -> None:
        loss = flow(data["latents"] + 0.3 * data["noise"], data["text"]).nll().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()

    return step


def worker(way: str, channels: int, batch: int, pipe: Any) -> None:
    checkpoint = "checkpointed" in way
    if way.startswith("mlx"):
        step = mlx_step(channels, batch, checkpoint, "not compiled" not in way)
    else:
        step = torch_step(channels, batch, checkpoint)
    before = peak()
    step()  # compiles
    pipe.send("ready")
    while pipe.recv():
        began = time.perf_counter()
        step()
        pipe.send((time.perf_counter() - began, peak() - before))


def peak() -> float:
    """Of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parts(channels: int, batch: int, turns: int) -> dict[str, float]:
    """Milliseconds of pieces of MLX's work: forward, forward with backward, and kinds of work in the layers."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_starflow.models.starflow import STARFlow
    from mlx_starflow.training.loop.objective import batch_loss

    flow = STARFlow(config(channels))
    data = {name: mx.array(array) for name, array in arrays(batch).items()}
    gradient = nn.value_and_grad(flow, lambda: batch_loss(flow, data)[0])
    # One layer's work, forward and backward, at the deep block's and the shallow blocks' lengths.
    rows = batch * (24 + 16) * 6 + batch * 16 * 4
    x, wide = mx.random.normal((rows, channels)), mx.random.normal((rows, 4 * channels))
    weights = [mx.random.normal((channels, n * channels)) for n in (3, 1, 4)]
    down = mx.random.normal((4 * channels, channels))
    gelu = mx.value_and_grad(lambda h: nn.gelu(h).sum())
    scale = mx.ones((channels,))
    norm = mx.value_and_grad(lambda h: mx.fast.rms_norm(h, scale, 1e-6).sum())

    def products() -> list[mx.array]:
        """Forward, and as often twice for the gradients of inputs and weights."""
        return [x @ w for w in weights for _ in range(3)] + [wide @ down for _ in range(3)]

    work = {
        "forward": lambda: batch_loss(flow, data)[0],
        "forward and backward": gradient,
        "the layers' matrix products alone": products,
        "the layers' GELUs alone": lambda: gelu(wide),
        "the layers' norms alone": lambda: [norm(x), norm(x)],
    }
    mx.eval(x, wide, weights, down)
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(turns):
        for name, function in work.items():
            began = time.perf_counter()
            mx.eval(function())
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: float(np.median(values)) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for way in args.ways:
        pipes[way], other = context.Pipe()
        context.Process(target=worker, args=(way, args.channels, args.batch_size, other), daemon=True).start()
        other.close()
        pipes[way].recv()  # one after another: compiling must not disturb
    measured: dict[str, list[tuple[float, float]]] = {way: [] for way in args.ways}
    for _ in range(args.turns):
        for way, pipe in pipes.items():
            pipe.send(True)
            measured[way].append(pipe.recv())
    tokens = args.batch_size * 16
    base = np.median([seconds for seconds, _ in measured[args.ways[0]]])
    print(f"a step of {args.batch_size} samples, {tokens} tokens")
    print(f"{'':<30}  ms/step  tokens/s  peak MB  time relative to {args.ways[0]}")
    for way in args.ways:
        seconds = float(np.median([seconds for seconds, _ in measured[way]]))
        memory = measured[way][-1][1]
        print(f"{way:<30}  {1000 * seconds:>7.0f}  {tokens / seconds:>8.0f}  {memory:>7.0f}  {seconds / base:.2f}")
    for pipe in pipes.values():
        pipe.send(False)
    print("where MLX's time goes, not compiled:")
    for name, milliseconds in parts(args.channels, args.batch_size, min(args.turns, 3)).items():
        print(f"  {name:<34}  {milliseconds:>6.0f} ms")


if __name__ == "__main__":
    main()
