"""The video autoencoder of Wan 2.2: its config, the network, and how its tensors are called elsewhere."""

from mlx_starflow.models.autoencoder_wan.config import AutoencoderWanConfig
from mlx_starflow.models.autoencoder_wan.network import AutoencoderWan, DecoderStream, EncoderStream

__all__ = ["AutoencoderWan", "AutoencoderWanConfig", "DecoderStream", "EncoderStream"]
