import gc
import warnings

import mlx.core as mx
import numpy as np
import pytest
from helpers.model_directories import write_image_model, write_video_model
from helpers.peaks import one_at_a_time
from helpers.precision import bound, roundings
from PIL import Image

from mlx_starflow import load
from mlx_starflow.errors import StarflowError
from mlx_starflow.media.noise import VideoNoise, draw_noise
from mlx_starflow.media.videos import VideoWriter
from mlx_starflow.pipelines import VideoPipeline, load_video
from mlx_starflow.pipelines.video_frames import encode_frames, last_frames
from mlx_starflow.pipelines.video_requests import read_past_video
from mlx_starflow.pipelines.video_results import VideoOverrides
from mlx_starflow.planning.memory import plan
from mlx_starflow.sampling import Progress, denoise, sample
from mlx_starflow.sampling.video import default_context


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_video_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(directory):
    return load(directory)


@pytest.fixture(scope="module")
def source(pipe):
    """A video of 13 frames."""
    return pipe.generate("a dog", seed=1, frames=13).videos[0]


@pytest.fixture
def seen(pipe, monkeypatch):
    """Every text that the text encoder reads."""
    texts = []
    batch = type(pipe.tokenizer).batch
    monkeypatch.setattr(
        type(pipe.tokenizer), "batch", lambda self, text, length: texts.extend(text) or batch(self, text, length)
    )
    return texts


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def differs(ours, theirs):
    return np.abs(pixels(ours) - pixels(theirs)).max()


def test_load_knows_what_makes_videos(pipe, tmp_path):
    assert isinstance(pipe, VideoPipeline)
    assert (pipe.format.window, pipe.settings.frames, pipe.settings.fps, pipe.settings.size) == (5, 17, 16, (48, 32))
    with pytest.raises(StarflowError, match="makes pictures, not videos"):
        load_video(write_image_model(tmp_path))


def test_a_video(pipe):
    result = pipe.generate(["a cat", ""], seed=5, videos=2)
    assert [len(video) for video in result.videos] == [17] * 4
    assert result.videos[0][0].size == (48, 32)
    assert result.latents.shape == result.noise.shape == (4, 5, 2, 3, 4)
    assert (result.prompts, result.seeds) == (["a cat", "a cat", "", ""], [5, 6, 5, 6])
    assert list(result.stats.seconds) == ["text", "flow", "denoise", "decode"]
    assert result.stats.tokens == 4 * 3 * 5 * 2 * 3
    assert all(count > 0 for count in result.stats.evaluations)
    assert result.metadata[3]["settings"]["frames"] == 17 and result.metadata[3]["seeds"] == [6]


def test_it_is_what_the_parts_make(pipe):
    result = pipe.generate("a cat", seed=5, guidance=1.0, temperature=0.9)
    texts = pipe.encode_prompts(["a cat", ""], (48, 32), 16)
    x = sample(pipe.flow, 0.9 * mx.array(draw_noise([5], (5, 2, 3, 4))), texts[:1], texts[1:], 1.0)
    clean = denoise(pipe.flow, x, texts[:1])
    assert np.abs(np.array(result.latents) - np.array(clean)).max() < 1e-3 * np.abs(np.array(clean)).max()
    frames = pipe.vae.decode(pipe.vae.unscale(clean))[0]
    assert np.abs(pixels(result.videos[0]) - np.clip((np.array(frames) + 1) * 127.5, 0, 255)).max() <= 1.5


def test_a_stream_is_the_same_video(pipe):
    result = pipe.generate(["a dog", "a cat"], seed=5, batch_size=2)
    stream = pipe.stream("a cat", seed=5)
    assert (stream.frames, stream.fps, stream.size) == (17, 16, (48, 32))
    assert differs(list(stream), result.videos[1]) <= 1
    assert stream.metadata == result.metadata[1]
    assert (stream.noise() == result.noise[1:]).all()
    assert stream.stats.tokens == result.stats.tokens / 2


@pytest.mark.parametrize("options", [{"frames": 25, "context": 2}, {"denoise": False}, {"attn_temp": 0.8}])
def test_so_is_a_stream_with_other_settings(pipe, options):
    whole = pipe.generate("a cat", seed=5, **options)
    assert len(whole.videos[0]) == options.get("frames", 17)
    assert differs(pipe.stream("a cat", seed=5, **options), whole.videos[0]) <= 1
    assert differs(pipe.stream("a cat", seed=5, live=False, **options), whole.videos[0]) <= 1


def test_frames_come_while_the_video_is_sampled(pipe, monkeypatch):
    drawn = []
    ask = VideoNoise.__getitem__
    monkeypatch.setattr(VideoNoise, "__getitem__", lambda self, key: drawn.append(key[1].stop) or ask(self, key))
    stream = pipe.stream("a cat", seed=5, frames=81, context=1)
    next(stream)
    assert max(drawn) < 21
    stream.close()
    assert next(iter(stream), None) is None


def test_noise_drawn_frame_by_frame_is_the_same():
    whole = draw_noise([3, 4], (7, 2, 3, 4))
    noise = VideoNoise([3, 4], (7, 2, 3, 4), before=2, scale=0.5)
    assert noise.shape == (2, 9, 2, 3, 4)
    parts = [noise[:, 3:4], noise[:, 5:9]]
    assert (np.concatenate(parts, axis=1) == 0.5 * whole[:, [1, 3, 4, 5, 6]]).all()
    with pytest.raises(IndexError):
        noise[:, 2:3]


def test_given_noise(pipe):
    first = pipe.generate("a cat", seed=3)
    again = pipe.generate("a cat", noise=first.noise)
    assert again.seeds == [None] and "noise_sha256" in again.metadata[0]
    assert differs(first.videos[0], again.videos[0]) == 0
    with pytest.raises(StarflowError, match=r"noise has shape \[1, 5, 2, 3, 4\]; this video needs \[1, 6, 2, 3, 4\]"):
        pipe.stream("a cat", noise=first.noise, frames=21)


def test_verification(pipe):
    stats = pipe.generate("a cat", seed=3, verify=True, method="sequential").stats
    assert stats.certificate.max < bound(1e-4, roundings(4)) and "verify" in stats.seconds
    stream = pipe.stream("a cat", seed=3, verify=True, method="sequential")
    list(stream)
    assert stream.stats.certificate.max < bound(1e-4, roundings(4))
    with pytest.raises(StarflowError, match="at most 17 frames"):
        pipe.stream("a cat", verify=True, frames=21)


def test_prompts_say_what_the_model_was_trained_with(pipe, seen):
    pipe.generate("a cat", seed=1, fps=24, size=(32, 48))
    assert seen == [f"Noise Level 500: A video with 24 fps: {what}in a 2:3 aspect ratio." for what in ("a cat ", "")]


def test_a_picture_of_a_video_model(pipe, seen):
    result = pipe.generate(["a cat", "a cat"], seed=1, frames=1, videos=2)
    assert seen[0] == "Noise Level 500: An image: a cat in a 3:2 aspect ratio."
    assert result.latents.shape == (4, 2, 3, 4) and result.seeds == [1, 2, 1, 2]
    assert [len(video) for video in result.videos] == [1] * 4
    stream = pipe.stream("a cat", seed=2, frames=1)
    assert differs(list(stream), result.videos[1]) == 0
    assert stream.stats.tokens
    same = pipe.image_pipeline.generate("a cat", seed=2, size=(48, 32))
    assert differs(same.images, result.videos[1]) == 0
    assert pipe.image_pipeline.flow is pipe.flow
    assert pipe.image_pipeline.score(same.images, "a cat")[0].nll == pipe.score(same.images, "a cat")[0].nll


def test_from_a_picture(pipe, source, seen, tmp_path):
    image = source[4]
    result = pipe.generate("it moves", seed=2, image=image)
    assert seen[0] == "Noise Level 500: A video with 16 fps: it moves in a 3:2 aspect ratio."
    assert len(result.videos[0]) == 17 and result.metadata[0]["source"] == {"image": None}
    assert result.stats.tokens == 3 * 4 * 2 * 3
    assert differs(pipe.stream("it moves", seed=2, image=image), result.videos[0]) <= 1
    # The frame that is given decides the first one; noise and prompt do not reach it but by the denoiser.
    flow = pipe.generate("it moves", seed=2, image=image, denoise=False).latents
    other = pipe.generate("it moves", seed=2, image=source[9], denoise=False).latents
    clean = pipe.vae.scale(pipe.vae.encode(mx.array(pixels([image]) / 127.5 - 1)).mean)
    noise = (np.array(flow[:, 0]) - np.array(clean)) / 0.5
    assert 0.5 < noise.std() < 1.5
    assert np.abs((np.array(other) - np.array(flow))[:, 0]).max() > 1e-3
    image.save(tmp_path / "first.png")
    named = pipe.stream("it moves", seed=2, image=tmp_path / "first.png")
    assert differs(named, result.videos[0]) <= 1
    assert named.metadata["source"] == {"image": str(tmp_path / "first.png")}


def test_from_a_video(pipe, source, seen):
    result = pipe.generate("a cat", seed=2, video=source)
    assert seen[0].startswith("Noise Level 500: A video with 16 fps: (v2v) a cat") and "(v2v)" not in seen[1]
    assert len(result.videos[0]) == 13 and result.latents.shape == (1, 4, 2, 3, 4)
    assert differs(pipe.stream("a cat", seed=2, video=iter(source)), result.videos[0]) <= 1
    # Source, then target, are one sequence.
    known = encode_frames(pipe.vae, source, (48, 32))
    assert known.shape == (1, 4, 2, 3, 4)
    assert differs(pipe.generate("a cat", seed=2, video=source[::-1]).videos[0], result.videos[0]) > 1
    assert pipe.stream("a cat", seed=2, video=source[:12]).frames == 9
    assert pipe.stream("a cat", seed=2, video=source * 2).frames == 17


def test_going_on_from_a_video(pipe, source, seen):
    result = pipe.generate("it goes on", seed=2, extend=source, frames=8)
    assert seen[0].startswith("Noise Level 500: A video with 16 fps: (extend) it goes on")
    assert len(result.videos[0]) == 8 and result.latents.shape == (1, 2, 2, 3, 4)
    assert differs(pipe.stream("it goes on", seed=2, extend=source, frames=8), result.videos[0]) <= 1
    assert pipe.stream("it goes on", seed=2, extend=source).frames == 16
    # With a context of 2 latent frames, what was before the last 9 frames is not seen.
    short = pipe.generate("it goes on", seed=2, extend=source, frames=8, context=2).videos[0]
    assert differs(pipe.generate("it goes on", seed=2, extend=source[4:], frames=8, context=2).videos[0], short) == 0


def test_a_continuation_sees_16_latent_frames_by_default(tmp_path):
    pipe = load(write_video_model(tmp_path, vid_size="81:16"))
    frames = [Image.new("RGB", (16, 16))] * 85
    for chosen, seen in (({}, 16), ({"context": 19}, 19)):
        asked = VideoOverrides(size=(16, 16), **chosen)
        given, _ = read_past_video(frames, asked, pipe.format, pipe.vae, 16, Progress())
        assert given.latents.shape[1] == seen
    assert [default_context(window) for window in (21, 17, 5)] == [16, 16, 4]


def test_a_continuation_is_decoded_after_its_source(pipe, source):
    result = pipe.generate("it goes on", seed=2, extend=source, frames=8)
    past = encode_frames(pipe.vae, source, (48, 32))
    both = mx.concatenate([past, result.latents], axis=1)
    frames = pipe.vae.decode(pipe.vae.unscale(both))[0, 13:]
    assert np.abs(pixels(result.videos[0]) - np.clip((np.array(frames) + 1) * 127.5, 0, 255)).max() <= 1.5


def test_a_video_file_is_read_at_the_rate_of_the_video(pipe, source, tmp_path):
    path = tmp_path / "slow.webp"
    with VideoWriter(path, 8) as writer:
        for frame in source:
            writer.add(frame)
    doubled = [frame for frame in source for _ in (0, 1)]
    named = pipe.generate("a cat", seed=2, video=path).videos[0]
    assert differs(named, pipe.generate("a cat", seed=2, video=doubled).videos[0]) == 0


def test_sizes(pipe, source):
    assert pipe.format.size_of("9:16") == (32, 48)
    assert pipe.stream("a cat", image=source[0].resize((90, 120))).size == pipe.format.size_of("4:5")
    assert pipe.stream("a cat", image=source[0].resize((90, 120)), size=(64, 16)).size == (64, 16)
    assert pipe.stream("a cat", image=source[0]).size == source[0].size


def test_a_model_of_squares_makes_squares(pipe, source, monkeypatch):
    monkeypatch.setattr(pipe.config, "mix_aspect", False)
    assert pipe.stream("a cat", image=source[0]).size == (32, 32)
    assert pipe.format.size_of("16:9") == (48, 32)


def test_low_memory_holds_one_network_at_a_time(directory, pipe, source):
    frugal = load(directory, low_memory=True)
    for options in ({}, {"extend": source}):
        options |= {"frames": 4 if "extend" in options else 5}
        result = frugal.generate("a cat", seed=1, **options)
        assert not frugal.backend.held
        assert differs(result.videos[0], pipe.generate("a cat", seed=1, **options).videos[0]) <= 1
        assert len(list(frugal.stream("a cat", seed=1, live=False, **options))) == len(result.videos[0])
        assert not frugal.backend.held


def test_predicted_memory(tmp_path):
    shape = {"channels": 128, "top_block_channels": 256, "layers_per_block": [1, 1, 4], "img_size": 6, "txt_size": 24}
    directory = write_video_model(tmp_path, **shape, mix_aspect=False)
    gc.collect()
    before = mx.get_active_memory()
    pipe = load(directory, low_memory=False)
    streams = [pipe.stream("a", seed=seed) for seed in (1, 2)]
    with warnings.catch_warnings(), one_at_a_time():
        warnings.simplefilter("ignore")
        assert [len(list(stream)) for stream in streams] == [17, 17]
    expected = plan(directory).phases()
    for phase in ("flow", "denoise", "decode"):
        held = max(stream.stats.memory[phase] for stream in streams) - before
        assert held <= expected[phase] <= 2 * held, phase


@pytest.mark.slow
@pytest.mark.usefixtures("in_mlx", "chosen_here")
@pytest.mark.parametrize("kv_bits", ["8", "8,4", "4"])
def test_predicted_memory_with_keys_and_values_in_fewer_bits(tmp_path, kv_bits):
    """Where keys and values take most memory, as in the released model, the plan is within 15%."""
    shape = {"channels": 128, "top_block_channels": 512, "layers_per_block": [1, 1, 4], "img_size": 16, "head_dim": 64}
    pipe = load(write_video_model(tmp_path, **shape, txt_size=24, mix_aspect=False), low_memory=True)
    gc.collect()
    before = mx.get_active_memory()
    with warnings.catch_warnings(), one_at_a_time():
        warnings.simplefilter("ignore")
        result = pipe.generate("a", seed=1, kv_bits=kv_bits, method="rolling", frames=9)
    assert result.settings.kv_bits == kv_bits and result.metadata[0]["settings"]["kv_bits"] == kv_bits
    expected = plan(pipe.directory, frames=9, kv_bits=result.settings.cache_bits).phases(low_memory=True)
    for phase in ("flow", "denoise"):
        assert expected[phase] == pytest.approx(result.stats.memory[phase] - before, rel=0.15), phase


def test_the_last_frames():
    images = [Image.new("L", (1, 1), value) for value in range(30)]
    kept = [image.getpixel((0, 0)) for image in last_frames(iter(images), 4, 3)]
    assert kept == list(range(17, 30))
    assert [image.getpixel((0, 0)) for image in last_frames(images[:7], 4, 3)] == [2, 3, 4, 5, 6]
    assert last_frames([], 4, 3) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frames": 16}, r"1 \+ a multiple of 4 frames: 13 or 17, not 16"),
        ({"frames": 2}, "1 or 5, not 2"),
        ({"frames": 0}, "frames must be 1 or more"),
        ({"fps": 0}, "frame rate must be 1 or more"),
        ({"size": (50, 32)}, "multiples of 16 pixels"),
        ({"context": 5, "frames": 41}, "context must be at most 4"),
        ({"context": 0}, "context must be 1 or more"),
        ({"seed": -1}, "seed is a whole number"),
        ({"image": "missing.png"}, "cannot read the picture missing.png"),
        ({"video": "missing.mp4"}, "missing.mp4 does not exist"),
        ({"video": []}, "has no frames"),
        ({"extend": [Image.new("RGB", (48, 32))] * 4}, "fewer than 5 frames"),
        ({"extend": [Image.new("RGB", (48, 32))] * 5, "frames": 7}, "a multiple of 4 frames: 4 or 8, not 7"),
        ({"extend": [Image.new("RGB", (48, 32))] * 5, "frames": 1}, "a multiple of 4 frames: 4, not 1"),
        ({"video": [Image.new("RGB", (48, 32))] * 9, "frames": 13}, "too short for 13 frames: ask for 9"),
        ({"video": [Image.new("RGB", (48, 32))] * 40, "frames": 37}, "at most 17 frames"),
        ({"image": Image.new("RGB", (48, 32)), "frames": 1}, "more than 1 frame"),
        ({"image": Image.new("RGB", (48, 32)), "video": []}, "image or video, not both"),
    ],
)
def test_mistakes(pipe, options, message):
    with pytest.raises(StarflowError, match=message):
        pipe.stream("a cat", **options)
    with pytest.raises(StarflowError, match=message):
        pipe.generate("a cat", **options)
