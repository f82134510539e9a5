import numpy as np
import pytest

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.noise import draw_noise, draw_seed, load_noise, save_noise


def test_a_seed_means_the_same_noise_everywhere():
    noise = draw_noise([7, 8], (2, 2, 1))
    # Philox is counter based: these numbers are the same on every machine.
    assert np.allclose(noise[0].ravel()[:2], np.random.Generator(np.random.Philox(7)).standard_normal(2, np.float32))
    assert (draw_noise([8], (2, 2, 1))[0] == noise[1]).all()
    assert noise.dtype == np.float32


def test_noise_is_standard_normal():
    noise = draw_noise([1], (64, 64, 4))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_drawn_seeds_differ():
    assert len({draw_seed() for _ in range(20)}) == 20


def test_round_trip(tmp_path):
    noise = draw_noise([1, 2], (3, 4, 5))
    save_noise(noise, tmp_path / "n.safetensors")
    assert (load_noise(tmp_path / "n.safetensors", (2, 3, 4, 5)) == noise).all()


def test_errors(tmp_path):
    path = tmp_path / "n.safetensors"
    save_noise(draw_noise([1], (3, 4, 5)), path)
    with pytest.raises(StarflowError, match=r"shape \[1, 3, 4, 5\]; these pictures need \[1, 4, 4, 5\]"):
        load_noise(path, (1, 4, 4, 5))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StarflowError, match="cannot be read as a noise file"):
        load_noise(path, (1, 3, 4, 5))
    with pytest.raises(StarflowError, match="cannot be written"):
        save_noise(draw_noise([1], (1,)), tmp_path / "no/such/n.safetensors")
    with pytest.raises(StarflowError, match="from 0 on"):
        draw_noise([-1], (1,))
