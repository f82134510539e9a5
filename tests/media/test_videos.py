import struct
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.paths import TESTS
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media import videos as media
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.media.video_geometry import natural_order, square_pixels
from mlx_starflow.media.videos import VideoWriter, read_video

METADATA = {"prompts": ["ein Käfer"], "settings": {"fps": 16}}


def frames(count=7, size=(32, 16)):
    """A square that moves to the right on a background that becomes brighter, in strong colours."""
    made = []
    for number in range(count):
        pixels = np.full((size[1], size[0], 3), (20, 20 + 20 * number, 200), np.uint8)
        pixels[4:12, 2 * number : 2 * number + 8] = (220, 30, 10)
        made.append(Image.fromarray(pixels))
    return made


def write(path, images, fps=16, **options):
    with VideoWriter(path, fps, **options) as writer:
        for image in images:
            writer.add(image)
    return path


def difference(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() for a, b in pairs)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name, tolerance", [("a.mp4", 6), ("a.webp", 0), ("a.gif", 3), ("a", 0)])
def test_what_is_written_is_read_back(tmp_path, name, tolerance, live):
    path = tmp_path / name
    if live and name in ("a.webp", "a.gif"):
        with pytest.raises(StarflowError, match="cannot be watched while it grows"):
            VideoWriter(path, 16, live=True)
        return
    write(path, frames(), crf=5, metadata=METADATA, live=live)
    video = read_video(path)
    assert video.fps == pytest.approx(16, abs=0.3)
    assert difference(video, frames()) <= tolerance
    assert read_metadata(path) == METADATA
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_movie_says_what_its_colours_mean(tmp_path):
    with av.open(str(write(tmp_path / "a.mp4", frames()))) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.average_rate, stream.frames) == ("h264", "yuv420p", 16, 7)
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


def test_crf_is_the_quality(tmp_path):
    noisy = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)) for n in range(3)]
    sizes = [write(tmp_path / f"{crf}.mp4", noisy, crf=crf).stat().st_size for crf in (0, 18, 40)]
    assert sizes[0] > 1.5 * sizes[1] > 4 * sizes[2]


def test_another_frame_rate(tmp_path):
    path = write(tmp_path / "a.webp", frames(8), fps=10)
    thinned = list(read_video(path, fps=5))
    assert difference(thinned, frames(8)[::2]) == 0
    doubled = list(read_video(path, fps=20))
    assert difference(doubled, [frame for frame in frames(8) for _ in (0, 1)]) == 0
    assert len(list(read_video(path, fps=16))) == 13


def test_durations_of_animations_add_up(tmp_path):
    for name in ("a.webp", "a.gif"):
        timed = media._animation_frames(write(tmp_path / name, frames(7), fps=16))[1]
        assert [end for _, _, end in timed][-1] == pytest.approx(7 / 16, abs=0.006)


def test_frames_are_read_when_they_are_asked_for(tmp_path):
    path = write(tmp_path / "a.mp4", frames(), crf=5)
    video = read_video(path, frames=4, size=(8, 8))
    assert video.read == 0
    first = next(video)
    assert video.read == 1 and first.size == (8, 8)
    assert len(list(video)) == 3
    with pytest.raises(StarflowError, match="has 7 frames at 16 frames a second; needed are 9"):
        list(read_video(path, fps=16, frames=9))


def test_a_folder_of_frames_is_in_the_order_of_names(tmp_path):
    for number, image in enumerate(frames(12)):
        image.save(tmp_path / f"{number:03}.png")
    assert difference(read_video(tmp_path, fps=24), frames(12)) == 0
    assert read_video(tmp_path, fps=24).fps == 24


def test_a_turned_movie_is_upright(tmp_path):
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.set_display_rotation(90)
        for image in frames(3):
            container.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB"))))
        container.mux(stream.encode(None))
    assert next(read_video(path)).size == (16, 32)
    turned = [image.transpose(Image.Transpose.ROTATE_90) for image in frames(3)]
    assert difference(read_video(path), turned) < 20


def patched(path, numbers):
    """Give a movie's track this display matrix: a, b, c and d of x' = a x + c y, y' = b x + d y."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (int(number * (1 << 16)) for number in numbers)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


T = Image.Transpose


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), None),
        ((-1, 0, 0, 1), T.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), T.FLIP_TOP_BOTTOM),
        ((-1, 0, 0, -1), T.ROTATE_180),
        ((0, 1, -1, 0), T.ROTATE_270),
        ((0, -1, 1, 0), T.ROTATE_90),
        ((0, 1, 1, 0), T.TRANSPOSE),
        ((0, -1, -1, 0), T.TRANSVERSE),
    ],
)
def test_mirrored_and_turned_movies(tmp_path, matrix, turn):
    path = patched(write(tmp_path / "a.mp4", frames(3), crf=5), matrix)
    expected = [image if turn is None else image.transpose(turn) for image in frames(3)]
    found = list(read_video(path))
    assert found[0].size == expected[0].size
    assert difference(found, expected) < 6


@pytest.mark.parametrize(("aspect", "size"), [((64, 45), (102, 58)), ((8, 9), (64, 58)), ((1, 1), (72, 58))])
def test_pixels_that_are_not_square(tmp_path, aspect, size):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 72, 58, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        for image in frames(3, (72, 58)):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    found = list(read_video(path))
    assert [image.size for image in found] == [size] * 3
    assert difference(found, [image.resize(size) for image in frames(3, (72, 58))]) < 20
    # What is cropped is what is seen: the middle of the wider picture.
    assert next(read_video(path, size=(29, 29))).size == (29, 29)


@pytest.mark.parametrize("aspect", [None, Fraction(0), Fraction(1, 65535), Fraction(65535, 1)])
def test_nonsense_about_pixels_is_not_heeded(aspect):
    assert square_pixels(frames(1)[0], aspect).size == (32, 16)


def test_frames_are_in_natural_order(tmp_path):
    for number, image in enumerate(frames(12)):
        image.save(tmp_path / f"frame-{number + 1}.png")
    assert difference(read_video(tmp_path), frames(12)) == 0


def test_names_in_natural_order(tmp_path):
    names = ["1.png", "2.png", "10.png", "a", "a1b2", "a1b10", "a02", "a2", "b"]
    assert [path.name for path in sorted(map(Path, reversed(names)), key=natural_order)] == names


def test_a_crash_leaves_the_old_video(tmp_path):
    for name in ("a.mp4", "a.webp", "new"):
        path = tmp_path / name
        before = path.write_bytes(b"old") if path.suffix else None
        with pytest.raises(OSError, match="something else"), VideoWriter(path, 16) as writer:
            writer.add(frames(1)[0])
            raise OSError("something else")
        assert path.read_bytes() == b"old" if before else not path.exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.mp4", "a.webp"]


def test_an_interrupted_live_video_is_whole(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 16, live=True) as writer:
        for image in frames(5):
            writer.add(image)
        raise KeyboardInterrupt
    assert len(list(read_video(path))) == 5


def test_a_killed_live_video_can_be_watched(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from media.test_videos import VideoWriter, frames
        writer = VideoWriter(Path(sys.argv[1]), 16, crf=5, metadata={"a": 1}, live=True).__enter__()
        for image in frames(6):
            writer.add(image)
        print("written", flush=True)
        time.sleep(60)
    """
    path = tmp_path / "a.mp4"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path), str(TESTS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.wait()
    # A frame is written when the next one tells how long it lasts.
    assert difference(read_video(path), frames(5)) < 6
    assert read_metadata(path) == {"a": 1}


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("a.avi", {}, "videos are written as .mp4"),
        ("no/a.mp4", {}, "folder .* does not exist"),
        ("no/a", {}, "folder .* does not exist"),
        ("full", {}, "new or empty"),
        ("a.mp4", {"crf": 60}, "crf must be from 0"),
        ("a.mp4", {"fps": 0}, "frame rate must be above 0"),
    ],
)
def test_mistakes_in_writing(tmp_path, name, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(StarflowError, match=message):
        VideoWriter(tmp_path / name, **{"fps": 16, **options})


def test_frames_that_do_not_fit(tmp_path):
    with pytest.raises(StarflowError, match="even width and height, not 31x16"):
        write(tmp_path / "a.mp4", frames(2, (31, 16)))
    with pytest.raises(StarflowError, match="a frame is 16x16"):
        write(tmp_path / "a.mp4", [*frames(2), *frames(1, (16, 16))])
    for name in ("a.mp4", "a.gif", "a"):
        with pytest.raises(StarflowError, match="there are no frames"):
            write(tmp_path / name, [])
    assert not list(tmp_path.iterdir())
    assert write(tmp_path / "odd.webp", frames(2, (31, 15))).exists()


def test_without_the_encoder_or_pyav(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(StarflowError, match="no H\\.264 encoder"):
        VideoWriter(tmp_path / "a.mp4", 16)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(StarflowError, match="pip install av"):
        VideoWriter(tmp_path / "a.mp4", 16)
    assert write(tmp_path / "a.gif", frames(2)).exists()


def test_mistakes_in_reading(tmp_path):
    with pytest.raises(StarflowError, match="does not exist"):
        read_video(tmp_path / "missing.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StarflowError, match="holds no frames"):
        read_video(tmp_path / "empty")
    for name in ("text.mp4", "text.gif"):
        (tmp_path / name).write_text("no video")
        with pytest.raises(StarflowError, match="cannot be read as a"):
            read_video(tmp_path / name)
        with pytest.raises(StarflowError, match="cannot be read as a"):
            read_metadata(tmp_path / name)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(StarflowError, match="no video stream"):
        read_video(tmp_path / "sound.mp4")
    for name in ("plain.mp4", "plain.webp", "plain.gif", "plain"):
        with pytest.raises(StarflowError, match="does not say how it was made"):
            read_metadata(write(tmp_path / name, frames(2)))
