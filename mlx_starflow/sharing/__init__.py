"""Publishing a model or an adapter on the Hugging Face Hub, with a card that says what it is."""

from mlx_starflow.sharing.card import make_card
from mlx_starflow.sharing.package import Package, pack
from mlx_starflow.sharing.send import send

__all__ = ["Package", "make_card", "pack", "send"]
