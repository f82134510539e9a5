"""STARFlow in MLX: text to pictures by one autoregressive normalizing flow, with exact likelihood and inversion."""

__version__ = "0.1.0"
