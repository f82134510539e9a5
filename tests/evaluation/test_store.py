"""Parts that are kept: computed once of the same, again of anything else, whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message

from mlx_starflow.evaluation.store import Part, Store


class Counted:
    """A part, and how often it was computed."""

    def __init__(self, value: float = 1.0):
        self.value, self.times = value, 0

    def __call__(self) -> Part:
        self.times += 1
        return Part({"x": np.full((2, 3), self.value, np.float32)}, {"said": ["a", "ü"]})


def test_a_part_is_computed_once(tmp_path) -> None:
    part = Counted()
    for _ in range(2):
        found = Store(tmp_path, {"seed": 1}).keep("a", {"of": [1, 2]}, part)
        np.testing.assert_array_equal(found.arrays["x"], np.ones((2, 3)))
        assert found.notes == {"said": ["a", "ü"]}
    assert part.times == 1
    Store(tmp_path, {"seed": 1}).keep("a", {"of": [1, 3]}, part)
    assert part.times == 2


def test_nothing_is_kept_without_a_folder() -> None:
    part, store = Counted(), Store(None, {})
    store.keep("a", 1, part)
    store.keep("a", 1, part)
    assert part.times == 2


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_damaged_part_is_computed_again(tmp_path, damage) -> None:
    part, store = Counted(), Store(tmp_path, {})
    store.keep("a", 1, part)
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
    np.testing.assert_array_equal(store.keep("a", 1, part).arrays["x"], np.ones((2, 3)))
    assert part.times == 2


def test_a_part_that_was_not_finished_is_not_there(tmp_path) -> None:
    def stopped() -> Part:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, {}).keep("a", 1, stopped)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_another_evaluation_is_refused(tmp_path) -> None:
    Store(tmp_path, {"seed": 1, "sampling": {"size": None}})
    Store(tmp_path, {"seed": 1, "sampling": {"size": None}})
    said = message(Store, tmp_path, {"seed": 2, "sampling": {"size": None}})
    assert "another seed: 1 there, 2 here" in said
    (tmp_path / "evaluation.json").write_text("{")
    assert "not valid JSON" in message(Store, tmp_path, {"seed": 1})
