"""STARFlow: a stack of autoregressive affine flows over the latents of an image autoencoder (arXiv 2506.06276)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class BlockConfig:
    """One flow block: an affine autoregressive map whose parameters a causal transformer predicts."""

    in_channels: int
    channels: int
    num_layers: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    expansion: int = 4
    norm_type: str = "layer_norm"
    use_bias: bool = True
    use_swiglu: bool = False
    use_qk_norm: bool = False
    use_post_norm: bool = False
    use_final_norm: bool = False
    hf_style_rope: bool = False
    """Rotary positions count 0, 1, 2, ... over text and tokens and pair dimension i with i + head_dim / 2."""
    txt_dim: int = 0
    """Width of the text embeddings that stand before the tokens; 0: this block does not see the text."""
    use_proj_txt: bool = True
    flip: bool = False
    sos: bool = True
    use_softplus: bool = True
    soft_clip: float = 0.0


@dataclass
class FlowConfig:
    """The official release's arguments that matter to the network; names and meanings are the release's.

    `img_size` counts latents, `pt_seq_len` tokens (the side of the square grid that positions are scaled to).
    """

    img_size: int
    channel_size: int
    patch_size: int
    channels: int
    layers_per_block: list[int]
    head_dim: int = 64
    num_heads: int | None = None
    num_kv_heads: int | None = None
    expansion: int = 4
    txt_size: int = 0
    txt_dim: int = 0
    noise_std: float = 0.3
    nvp: bool = True
    rope: bool = True
    sos: bool = True
    seq_order: str = "L2R"
    pt_seq_len: int | None = None
    use_softplus: bool = False
    cond_top_only: bool = True
    use_final_norm: bool = False
    soft_clip: float = 0.0
    cfg: float = 0.0
    use_bias: bool = True
    use_swiglu: bool = False
    use_qk_norm: bool = False
    use_post_norm: bool = False
    norm_type: str = "layer_norm"
    top_block: dict[str, Any] | None = None
    top_block_channels: int | None = None
    latent_norm_regularization: float = 0.0
    vid_size: str | None = None
    fps_cond: bool = False
    temporal_causal: int = 0
    shallow_block_local: bool = False
    learnable_self_denoiser: bool = False
    conditional_denoiser: bool = False
    denoiser_window: int | None = None
    cond_noise_level: bool = False
    mix_aspect: bool = False
    blocks: list[BlockConfig] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.layers_per_block, str):
            self.layers_per_block = [int(n) for n in self.layers_per_block.split()]
        if self.pt_seq_len is None:
            self.pt_seq_len = self.img_size // self.patch_size
        self.blocks = [self._block(index) for index in range(len(self.layers_per_block))]

    def _block(self, index: int) -> BlockConfig:
        count = len(self.layers_per_block)
        deep = index == count - 1
        channels = self.channels
        if deep and self.top_block_channels:
            channels = self.top_block_channels
        heads = self.num_heads or channels // self.head_dim
        sees_text = self.txt_size > 0 and (deep or not self.cond_top_only)
        values: dict[str, Any] = {
            "in_channels": self.channel_size * self.patch_size**2,
            "channels": channels,
            "num_layers": self.layers_per_block[index],
            "head_dim": self.head_dim,
            "num_heads": heads,
            "num_kv_heads": self.num_kv_heads or heads,
            "expansion": self.expansion,
            "norm_type": self.norm_type,
            "use_bias": self.use_bias,
            "use_swiglu": self.use_swiglu,
            "use_qk_norm": self.use_qk_norm,
            "use_post_norm": self.use_post_norm,
            "use_final_norm": self.use_final_norm,
            "txt_dim": self.txt_dim if sees_text else 0,
            # Blocks alternate; the deep block's order depends on how many there are.
            "flip": ((count % 2 == 1) if deep else (index % 2 == 0)) != (self.seq_order == "R2L"),
            "sos": self.sos,
            "use_softplus": self.use_softplus,
            "soft_clip": float(self.soft_clip),
        }
        if deep and self.top_block:
            known = {f.name for f in fields(BlockConfig)}
            values.update({key: value for key, value in self.top_block.items() if key in known})
        return BlockConfig(**values)
