"""Models of text: directories, writing, filling gaps, scoring."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_text import text_flow, text_model

from mlx_starflow import StarflowError, load, load_flow, load_text
from mlx_starflow.likelihood.text import score_characters
from mlx_starflow.model_dir.directory import is_text_model
from mlx_starflow.pipelines.text import TextPipeline
from mlx_starflow.sampling import RollingSettings


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load_text(text_model(tmp_path_factory.mktemp("text") / "model"), dtype="float32")


def test_a_directory_comes_back(pipe):
    flow, own = text_flow(), pipe.flow
    assert own.config == flow.config
    z = mx.array(np.random.default_rng(0).standard_normal((1, 12, 3)).astype(np.float32))
    assert np.array_equal(np.array(own(z).z), np.array(flow(z).z))


def test_other_commands_say_what_it_is(pipe, tmp_path):
    assert is_text_model(pipe.name) and not is_text_model("demo") and not is_text_model(tmp_path / "none")
    for open_it in (load, load_flow):
        with pytest.raises(StarflowError, match="is a model of text, which generate, score and load_text take"):
            open_it(pipe.name)
    with pytest.raises(StarflowError, match="is no model of text: its model_type is 'starflow'"):
        load_text("demo")


@pytest.mark.parametrize("method", ["sequential", RollingSettings(window=4, tolerance=1e-4)])
def test_a_text_goes_on_after_its_prompt(pipe, method):
    made = pipe.generate("bad ", texts=3, seed=5, method=method, verify=True, progress=False)
    assert [len(text) for text in made.texts] == [12] * 3
    assert all(text.startswith("bad ") for text in made.texts)
    assert made.certificate.max < 2e-3 and made.seed == 5
    if method == "sequential":
        assert made.evaluations == 2 * 8
    # Each text is that of its own seed, in a batch or alone, and whatever method samples it.
    assert pipe.generate("bad ", seed=7, progress=False).texts == made.texts[2:]


@pytest.mark.parametrize("patch", [1, 2])
def test_long_texts_are_written_piece_by_piece(patch):
    pipe = TextPipeline("tiny", text_flow(patch_size=patch))
    made = pipe.generate("bad", length=33, seed=1, verify=True, progress=False)
    assert len(made.texts[0]) == 33 and made.texts[0].startswith("bad") and len(made.certificates) > 3
    assert made.certificate.max < 2e-3
    start = pipe.generate("bad", length=12, seed=1, progress=False)
    assert made.texts[0].startswith(start.texts[0])
    long = pipe.generate("bad cab " * 4, length=40, seed=1, progress=False)
    assert long.texts[0].startswith("bad cab " * 4) and len(long.texts[0]) == 40


def test_gaps_are_filled_and_nothing_else_changes(pipe):
    made = pipe.fill("ba__cab _g", texts=4, seed=2, verify=True, progress=False)
    assert made.certificate.max < 2e-3
    for text in made.texts:
        assert len(text) == 10 and text[:2] == "ba" and text[4:8] == "cab " and text[9] == "g"
    assert len(set(made.texts)) > 1
    assert pipe.fill("ba??cab", blank="?", seed=2, progress=False).texts[0].startswith("ba")


def test_filled_characters_have_the_conditional_distribution():
    """That of a gap of one character, from the likelihoods of all that may stand there."""
    flow = text_flow(alphabet="abc", components=[3, 0], length=4, size=2)
    flow.codebook.mean = mx.array([[0.0, 2.0], [2.0, 0.0], [-2.0, -2.0]])
    flow.blocks[0].proj_out.weight = 3 * flow.blocks[0].proj_out.weight
    pipe, count = TextPipeline("tiny", flow), 600
    made = pipe.fill("a_cb", texts=count, seed=0, progress=False)
    shares = np.array([sum(text[1] == character for text in made.texts) / count for character in "abc"])
    gap = flow.filling([False, True, False, False])
    rng = np.random.default_rng(0)
    weights = []
    for character in range(3):
        texts = mx.array(np.tile(np.array([0, character, 2, 1], np.int32), (400, 1)))
        noise = mx.array(rng.standard_normal((400, 4, 2)).astype(np.float32))
        weights.append(np.exp(np.array(gap.log_weights(texts, noise)[:, 1], np.float64)).mean())
    assert abs(sum(weights) - 1) < 0.03
    assert np.abs(shares - weights).max() < 0.07


def test_what_cannot_be_written(pipe):
    for arguments, message in (
        ({"prompt": "bad", "length": 3}, "the prompt has 3: give more"),
        ({"prompt": "zoo"}, "does not know the character 'z'"),
        ({"texts": 0}, "number of texts must be 1 or more"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"method": "guess"}, "unknown sampling method"),
    ):
        with pytest.raises(StarflowError, match=message):
            pipe.generate(**arguments, progress=False)
    for text, message in (("bad", "has no gap"), ("a_" * 9, "has 18 characters, and the model reads 12")):
        with pytest.raises(StarflowError, match=message):
            pipe.fill(text, progress=False)


def test_scores_are_bounds_of_the_likelihood(pipe):
    text = "bad cab dead beef"
    score = pipe.score(text, draws=32, progress=False)
    assert score.characters == len(text) and score.draws == 32
    assert score.importance_weighted <= score.bits_per_character + 1e-9
    assert 0 < score.standard_error < 0.2
    assert score == pipe.score(text, draws=32, progress=False)
    # By hand, window by window.
    flow, total = pipe.flow, 0.0
    from mlx_starflow.likelihood.nll import training_noise

    for number, piece in enumerate((text[:12], text[12:])):
        noise = mx.array(training_noise(1, (len(piece), 3), 0, 0, [number]))
        total += float(flow.log_weight(flow.characters(piece)[None], noise)[0])
    alone = pipe.score(text, draws=1, progress=False)
    assert abs(alone.bits_per_character + total / len(text) / math.log(2)) < 1e-4
    assert alone.standard_error is None
    with pytest.raises(StarflowError, match="too short to score"):
        pipe.score("", progress=False)
    with pytest.raises(StarflowError, match="draws must be 1 or more"):
        score_characters(flow, np.zeros(4, np.int32), draws=0)
