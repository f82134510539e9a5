"""Checkpoints whose tensors are many times as large as the file."""

from __future__ import annotations

import pytest
from helpers.commands import message

from mlx_starflow.convert import read_checkpoint

torch = pytest.importorskip("torch")


def test_many_tensors_expanded_from_little(tmp_path):
    """Each of them is below the limit of one."""
    one = torch.zeros(1).expand(2**25)
    torch.save({f"w{number}": one for number in range(50)}, tmp_path / "a.pth")
    assert "save them unexpanded, and each once" in message(read_checkpoint, tmp_path / "a.pth")


def test_tied_weights_are_fine(tmp_path):
    one = torch.zeros(1000, 1000)
    torch.save({f"w{number}": one for number in range(10)}, tmp_path / "a.pth")
    assert len(read_checkpoint(tmp_path / "a.pth")) == 10
