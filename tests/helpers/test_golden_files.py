"""The weights of the golden cases are put together right, or not at all."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256

import numpy as np
import pytest

from helpers.golden_files import DATA, golden_case, normal, rebuild, uniform

CASES = sorted({path.parent.name for path in DATA.glob("*/*.rest")})


@pytest.mark.parametrize("case", CASES)
def test_a_case_is_complete(case):
    files = {path.name for path in (DATA / case).iterdir()}
    made = {name.removesuffix(".rest") for name in files if name.endswith(".rest")}
    expected = made | {name for name in files if name.removesuffix(".json") not in made and not name.endswith(".rest")}
    assert {path.name for path in golden_case(case).iterdir()} == expected
    for name in made:
        recipe = json.loads((DATA / case / f"{name}.json").read_text())
        assert sha256((golden_case(case) / name).read_bytes()).hexdigest() == recipe["sha256"]


@pytest.mark.parametrize(("old", "new"), [('"seed": 12', '"seed": 13'), ('"+", 1.0', '"+", 1.5')])
def test_another_result_is_an_error(old, new, tmp_path):
    path = tmp_path / "model.pth.rest"
    shutil.copyfile(DATA / "tarflow_vp/model.pth.rest", path)
    recipe = (DATA / "tarflow_vp/model.pth.json").read_text()
    assert old in recipe
    path.with_suffix(".json").write_text(recipe.replace(old, new))
    with pytest.raises(ValueError, match="SHA-256"):
        rebuild(path)


@pytest.mark.torch
@pytest.mark.parametrize("size", [16, 17, 31, 100_003])
def test_draws_are_those_of_pytorch(size):
    torch = pytest.importorskip("torch")
    torch.manual_seed(5)
    twister = np.random.MT19937()
    twister._legacy_seeding(5)
    tail = 16 if size % 16 else 0
    numbers = twister.random_raw(2 * size + tail).astype(np.uint32)
    expected = torch.empty(size).normal_(), torch.empty(size).uniform_()
    np.testing.assert_array_equal(normal(numbers[: size + tail], size), expected[0])
    np.testing.assert_array_equal(uniform(numbers[size + tail :]), expected[1])
