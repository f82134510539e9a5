"""Networks that enlarge pictures: Real-ESRGAN's RRDBNet, its compact SRVGGNet, and SPAN."""

from mlx_starflow.models.upscalers.network import UpscalingNetwork
from mlx_starflow.models.upscalers.rrdb import RRDBNet
from mlx_starflow.models.upscalers.span import SPAN
from mlx_starflow.models.upscalers.srvgg import SRVGGNet

ARCHITECTURES: tuple[type[UpscalingNetwork], ...] = (RRDBNet, SRVGGNet, SPAN)
"""All of them; a checkpoint is one's if that `recognizes` its tensors."""

__all__ = ["ARCHITECTURES", "SPAN", "RRDBNet", "SRVGGNet", "UpscalingNetwork"]
