"""The README's table of memory, computed from the models' configs: `python examples/reports/memory.py`."""

from __future__ import annotations

from mlx_starflow.model_dir.precision import automatic
from mlx_starflow.planning.memory import ModelConfigs, plan
from mlx_starflow.planning.summary import model_configs
from mlx_starflow.sampling.cache import KVBits

MACS = (8, 16, 24, 32, 48, 64, 96, 128)
"""Memory that Macs are sold with, GB."""

ROWS: tuple[tuple[str, str, str, tuple[int, int] | None, KVBits], ...] = (
    ("`demo`, in this package", "demo", "pictures of 128x128", None, 0),
    ("`apple/starflow`, 3 B", "apple/starflow", "pictures of 256x256", None, 0),
    ("`apple/starflow-v`, 7 B", "apple/starflow-v", "81 frames of 432x240", (432, 240), 0),
    ("`apple/starflow-v`, 7 B", "apple/starflow-v", "81 frames of 848x480", None, 0),
    ("the same, keys and values in 8 bits", "apple/starflow-v", "81 frames of 848x480", None, 8),
    ("the same, those of guidance's null branch in 4", "apple/starflow-v", "81 frames of 848x480", None, (8, 4)),
)
"""What it is, the model, what it makes, at which size, and the bits of keys and values, 0 for as they are computed."""

PRECISIONS = {"16 bits": None, "8 bits": "8", "4 bits": "4"}


def smallest(configs: ModelConfigs, size: tuple[int, int] | None, kv_bits: KVBits, quantization: str | None) -> str:
    """The smallest Mac whose GPU may use what one image or video takes, and that peak, one network at a time."""
    packed_images = quantization is not None and not configs.flow.video
    flow_dtype = automatic("metal", quantized_flow=packed_images).dtype
    needed = plan(
        configs, size=size, dtype="float16", flow_dtype=flow_dtype, quantization=quantization, kv_bits=kv_bits
    )
    gigabytes = next(memory for memory in MACS if needed.fits(memory, low_memory=True))
    peak = needed.peak(low_memory=True) / 2**30
    return f"{gigabytes} GB ({f'{peak:.1f}' if peak >= 0.1 else 'below 0.1'})"


def table() -> str:
    lines = [f"| model | makes | {' | '.join(PRECISIONS)} |", "|---|---|" + "---|" * len(PRECISIONS)]
    for title, model, makes, size, kv_bits in ROWS:
        configs = model_configs(model)
        assert configs is not None, model
        dense = ModelConfigs(configs.flow, configs.text_encoder, configs.vae, guidance=configs.guidance)
        cells = [smallest(dense, size, kv_bits, quantization) for quantization in PRECISIONS.values()]
        lines.append(f"| {title} | {makes} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
