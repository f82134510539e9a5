"""The PyTorch reference: the same networks from the same configs, on a CPU or with CUDA, to read beside the MLX code.

It trains where PyTorch is the faster tool, is what the MLX networks are compared with, and runs the same models
(`mlx-starflow generate --backend torch`). Its modules are named as theirs are.
"""

from __future__ import annotations

from importlib.util import find_spec

from mlx_starflow.errors import StarflowError

if find_spec("torch") is None:
    raise StarflowError("this needs PyTorch: pip install 'mlx-starflow[torch]'")
