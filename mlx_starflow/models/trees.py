"""MLX's trees of modules and parameters, typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from mlx.utils import tree_flatten


def flattened(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths; `tree_flatten` says that it may also give a dictionary."""
    return cast(list[tuple[str, Any]], tree_flatten(tree, is_leaf=is_leaf))
