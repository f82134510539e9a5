"""Every kind of training data, and everything that can be wrong with it."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.image_files import find_images
from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.media.pixels import UnreadableImage, decode_image
from mlx_starflow.media.sources import Sample, Skip, open_source, skip_report, write_skips
from mlx_starflow.media.sources.sample import captions_of, skip_line

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def pack(path: Path, members: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def listed(source) -> list[tuple]:
    """Keys, captions and colours; of what is skipped, keys and reasons. Two passes must give the same."""
    passes = []
    for _ in range(2):
        # Pictures are read after the pass, as somebody who prepares the next step does.
        items = list(source)
        passes.append(
            [
                (item.key, item.reason)
                if isinstance(item, Skip)
                else (item.key, item.captions, decode_image(item.read()).getpixel((0, 0)))
                for item in items
            ]
        )
    assert passes[0] == passes[1]
    if source.total is not None:
        assert len(passes[0]) == source.total
    return passes[0]


def message(data: object, *arguments: object) -> str:
    with pytest.raises(StarflowError) as raised:
        list(open_source(data, *arguments))
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- folders


def test_texts_beside_pictures(tmp_path):
    folder = write(
        tmp_path,
        {
            "b.png": png("red"),
            "b.txt": "\ufeffa red\n thing ",
            "a/c.d.PNG": png("lime"),
            "a/c.d.txt": "a green thing",
            "z.png": png("blue"),
            "y.png": png("blue"),
            "y.txt": " \n",
            "x.png": png("blue"),
            "x.txt": b"\xff\xfe\xff",
            "w.png": png("blue"),
            "notes.txt": "no picture",
            "._b.png": b"what macOS leaves behind",
            ".hidden/b.png": png("red"),
        },
    )
    (folder / "w.txt").mkdir()
    assert listed(open_source(folder)) == [
        ("a/c.d.PNG", ("a green thing",), COLOURS["lime"]),
        ("b.png", ("a red thing",), COLOURS["red"]),
        ("w.png", "its .txt cannot be read: Is a directory"),
        ("x.png", "its .txt is not UTF-8"),
        ("y.png", (), COLOURS["blue"]),
        ("z.png", (), COLOURS["blue"]),
    ]
    problems = [item.problem() for item in open_source(str(folder)) if isinstance(item, Sample)]
    assert problems == [None, None, "no caption", "no caption"]


def test_metadata_jsonl(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "a  red\nthing", "captions": ["red", "a red thing", ""], "split": "train"},
        {"file_name": "sub/b.png", "text": None, "split": None},
        {"file_name": "a.png", "caption": "another", "split": "held_out", "more": 5},
        {"file_name": "a.png", "text": "\ud800"},
    ]
    folder = write(tmp_path, {"a.png": png("red"), "sub/b.png": png("blue"), "not-named.png": png("lime")})
    write(folder, {"metadata.jsonl": "\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", "not-named.txt": "x"})
    for data in (folder, folder / "metadata.jsonl"):
        source = open_source(data)
        assert listed(source) == [
            ("a.png", ("a red thing", "red"), COLOURS["red"]),
            ("sub/b.png", (), COLOURS["blue"]),
            ("a.png", ("another",), COLOURS["red"]),
            ("a.png", ("\ud800",), COLOURS["red"]),
        ]
        samples = list(source)
        assert [sample.split for sample in samples] == ["train", "train", "held_out", "train"]
        assert samples[2].row["more"] == 5
        assert samples[3].problem() == "its caption is not valid Unicode"
    assert [sample.captions for sample in open_source(folder, "caption")][2:] == [("another",), ()]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '"file_name"', "3", '{"text": "a"}', '{"file_name": 3}', '{"file_name": ""}', "[" * 100000,
     '{"file_name": "0.png", "text": "a", "more": ' + "[" * 100 + "]" * 100 + "}",
     '{"file_name": "0.png", "text": 5}', '{"file_name": "0.png", "captions": [1]}', "\xff"],
)  # fmt: skip
def test_broken_jsonl(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "0.png"}\n' + line.encode("latin-1"))
    assert message(tmp_path).endswith('metadata.jsonl, line 2: expected an object with "file_name" and "text"')


def test_metadata_csv(tmp_path):
    text = 'file_name,text,split\r\na.png,"a ""red"" thing,\nlarge",\r\n\r\nsub/b.png,,held_out\r\nsub/b.png\r\n'
    folder = write(tmp_path, {"a.png": png("red"), "sub/b.png": png("blue"), "metadata.csv": "\ufeff" + text})
    source = open_source(folder)
    assert listed(source) == [
        ("a.png", ('a "red" thing, large',), COLOURS["red"]),
        ("sub/b.png", (), COLOURS["blue"]),
        ("sub/b.png", (), COLOURS["blue"]),
    ]
    assert [sample.split for sample in source] == ["train", "held_out", "train"]
    assert [sample.captions for sample in open_source(folder / "metadata.csv", "split")][1] == ("held_out",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "line 1: expected the columns file_name and text, not "),
        ("name,text\na.png,x\n", "line 1: expected the columns file_name and text, not name, text"),
        ("file_name,text\na.png,x\nb.png,x,y\n", "line 3: expected 2 fields and a file_name"),
        ("file_name,text\n,x\n", "line 2: expected 2 fields and a file_name"),
        ('file_name,text\na.png,"x\n', "is not a CSV file in UTF-8: unexpected end of data"),
        (b"file_name,text\na.png,\xff\n", "is not a CSV file in UTF-8: "),
    ],
)
def test_broken_csv(tmp_path, text, expected):
    assert expected in message(write(tmp_path, {"metadata.csv": text}))


def test_a_caption_column_that_is_not_there(tmp_path):
    folder = write(tmp_path, {"metadata.csv": "file_name,text\na.png,x\n"})
    assert message(folder, "title").endswith("expected the columns file_name and title, not file_name, text")


def test_classes(tmp_path):
    folder = write(
        tmp_path,
        {
            "red_panda/2.png": png("red"),
            "red_panda/10.png": png("red"),
            "train/cat/1.jpg.png": png("blue"),
            "cat/readme.md": "x",
        },
    )
    source = open_source(folder)
    assert listed(source) == [
        ("red_panda/10.png", ("red panda",), COLOURS["red"]),
        ("red_panda/2.png", ("red panda",), COLOURS["red"]),
        ("train/cat/1.jpg.png", ("cat",), COLOURS["blue"]),
    ]
    assert next(iter(source)).row == {"label": "red_panda"}


def test_folders_with_repeats(tmp_path):
    """kohya's: 10_name counts 10 times, its caption is the name unless the picture has one of its own."""
    files = {
        "10_rex_the dog/1.png": png("red"),
        "10_rex_the dog/2.png": png("blue"),
        "10_rex_the dog/2.txt": "rex asleep",
        "3_dog/sub/1.png": png("green"),
    }
    source = open_source(write(tmp_path, files))
    samples = [item for item in source if isinstance(item, Sample)]
    assert source.total == 3
    assert {sample.key: (sample.captions, sample.repeats) for sample in samples} == {
        "10_rex_the dog/1.png": (("rex the dog",), 10),
        "10_rex_the dog/2.png": (("rex asleep",), 10),
        "3_dog/sub/1.png": (("dog",), 3),
    }
    write(tmp_path, {"20000_cat/1.png": png("red")})
    assert "20000_cat asks for 20000 repeats of each picture; at most 10000 are taken" in message(tmp_path)


@pytest.mark.parametrize("folders", [("1_cat", "2_dog", "3_bird"), ("01_cat", "02_dog"), ("10_cat", "dog"), ("10_",)])
def test_numbered_classes_are_classes(tmp_path, folders):
    source = open_source(write(tmp_path, {f"{folder}/1.png": png("red") for folder in folders}))
    found = {item.captions[0]: item.repeats for item in source if isinstance(item, Sample)}
    assert found == {folder.replace("_", " ").strip(): 1 for folder in folders}


def test_a_caption_for_all(tmp_path):
    caption = "a photo of  rex the dog"
    write(tmp_path, {"1.png": png("red"), "2.png": png("blue"), "2.txt": "rex asleep", "2023/3.png": png("green")})
    assert [item.captions for item in open_source(tmp_path, caption=caption) if isinstance(item, Sample)] == [
        ("a photo of rex the dog",),
        ("rex asleep",),
        ("a photo of rex the dog",),
    ]
    (tmp_path / "2.txt").unlink()
    assert len({item.captions for item in open_source(tmp_path, caption=caption) if isinstance(item, Sample)}) == 1
    assert "the caption is empty" in message(tmp_path, None, " ")


def test_a_caption_is_for_those_that_have_none(tmp_path):
    lines = [{"file_name": "1.png", "text": "a cat"}, {"file_name": "2.png"}]
    write(tmp_path, {"1.png": png("red"), "2.png": png("red"), "metadata.jsonl": "\n".join(map(json.dumps, lines))})
    assert [item.captions for item in open_source(tmp_path, caption="x") if isinstance(item, Sample)] == [
        ("a cat",),
        ("x",),
    ]
    folder = write(tmp_path / "classes", {"cat/1.png": png("red")})  # then folders are no classes
    assert [item.captions for item in open_source(folder, caption="x") if isinstance(item, Sample)] == [("x",)]


def test_nothing_to_train_on(tmp_path):
    assert message(tmp_path / "no").endswith("no does not exist; give a folder of pictures with captions, or hf:NAME")
    for kind in ("metadata.jsonl", "metadata.csv", ".tar shards", "a saved data set", ".txt files", "classes"):
        assert kind in message(tmp_path)
    write(tmp_path, {"a.png": png("red"), "b/c.png": png("red")})
    assert "has 2 pictures but no captions: give one for all of them (--caption), put a .txt file" in message(tmp_path)
    assert "is no training data: give a folder, a metadata.jsonl" in message(tmp_path / "a.png")


def test_pictures_that_are_not_there(tmp_path):
    rows = [{"file_name": name, "text": "x"} for name in ("gone.png", "a\0b.png", "folder")]
    (tmp_path / "folder").mkdir()
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for sample in open_source(tmp_path):
        with pytest.raises((OSError, ValueError)):
            sample.read()


def test_a_folder_without_permission(tmp_path, monkeypatch):
    write(tmp_path, {"a/b.png": png("red"), "c/d.png": png("red")})
    allowed = os.scandir

    def scandir(path):
        if str(path).endswith("/c"):
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert message(tmp_path) == f"cannot read {tmp_path / 'c'}: Permission denied"


# ---- shards


def test_shards(tmp_path):
    pack(
        tmp_path / "b-1.tar",
        {
            "x/1.txt": "one",
            "x/1.png": png("red"),
            "x/2.PNG": png("lime"),
            "x/2.json": json.dumps({"caption": "two", "captions": ["zwei"], "split": "held_out"}),
            "x/3.png": png("blue"),
            "x/3.cls": "7",
            "x/3.note.txt": "not a caption: its ending is .note.txt",
            "README": "no sample",
            "x/4.mp3": "no sample",
            ".png": "no sample",
            "x/._1.png": "no sample",
        },
    )
    pack(tmp_path / "a-0.tar", {"1.webp": png("blue"), "1.txt": "first", "1.json": "{"})
    write(tmp_path, {"ignored.png": png("red"), ".hidden.tar": "x"})
    source = open_source(tmp_path)
    assert listed(source) == [
        ("a-0.tar/1", ("first",), COLOURS["blue"]),
        ("b-1.tar/x/1", ("one",), COLOURS["red"]),
        ("b-1.tar/x/2", ("two", "zwei"), COLOURS["lime"]),
        ("b-1.tar/x/3", ("7",), COLOURS["blue"]),
    ]
    assert [sample.split for sample in source] == ["train", "train", "held_out", "train"]
    assert [sample.captions for sample in open_source(tmp_path / "b-1.tar", "captions")][1] == ("zwei",)


def test_samples_that_are_incomplete(tmp_path):
    path = pack(
        tmp_path / "s.tar",
        {
            "1.png": png("red"),
            "2.txt": "no picture",
            "3.png": png("red"),
            "3.json": "[1]",
            "4.png": png("red"),
            "4.txt": b"\xff",
            "5.png": png("red"),
            "5.txt": "x" * (1 << 20) + "x",
            "6.png": png("red"),
            "6.json": '{"text": 5}',
            "7.png": png("red"),
            "7.json": "[" * 100000,
            "8.png": png("red"),
            "8.json": '{"text": "a", "more": ' + "[" * 100 + "]" * 100 + "}",
            "9.png": png("red"),
            "9.txt": "nine",
        },
    )
    bad = "its caption cannot be read"
    assert listed(open_source(path)) == [
        ("s.tar/1", (), COLOURS["red"]),
        ("s.tar/2", "no picture"),
        *((f"s.tar/{number}", bad) for number in range(3, 9)),
        ("s.tar/9", ("nine",), COLOURS["red"]),
    ]


def test_hostile_names_are_names_and_no_more(tmp_path):
    outside = tmp_path / "outside.png"
    folder = tmp_path / "data"
    folder.mkdir()
    names = [
        "../outside.png",
        "/etc/passwd.png",
        "a/../../b.png",
        "new\nline\x1b[31m.png",
        "\udcff.png",
        "x" * 300 + ".png",
    ]
    path = pack(folder / "s.tar", {name: png("red") for name in names} | {n[:-4] + ".txt": "text" for n in names})
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            link = tarfile.TarInfo(f"kind{ord(kind)}.png")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    items = listed(open_source(folder))
    assert [key for key, _, _ in items] == [f"s.tar/{name[:-4]}" for name in names]
    assert not outside.exists() and sorted(folder.iterdir()) == [path]
    skips = [Skip(key, "why\tnot") for key, _, _ in items]
    assert all(skip_line(skip).count("\n") == skip_line(skip).count("\t") == 1 for skip in skips)
    write_skips(tmp_path / "new/skipped.txt", skips)
    assert "new\\nline\\x1b[31m" in (tmp_path / "new/skipped.txt").read_text()
    assert skip_report(skips[3:4], Path("skipped.txt")) == (
        "skipped 1: s.tar/new\\nline\\x1b[31m (why\\tnot); all of them are in skipped.txt"
    )
    assert skip_report(skips).startswith("skipped 6: ") and skip_report(skips).endswith(", ...")
    write_skips(tmp_path / "new/skipped.txt", [])
    assert not list((tmp_path / "new").iterdir())


def test_members_that_lie_about_their_size(tmp_path):
    path = pack(tmp_path / "s.tar", {"1.txt": "one", "1.png": png("red")})
    whole = path.read_bytes()
    member = tarfile.TarInfo("2.png")
    member.size = 1 << 60
    path.write_bytes(whole[:2048] + member.tobuf(tarfile.GNU_FORMAT) + tarfile.TarInfo("3.txt").tobuf())
    items = list(open_source(path))
    assert [item.key for item in items][:2] == ["s.tar/1", "s.tar/2"]
    with pytest.raises(UnreadableImage, match="the archive ends before its end"):
        items[1].read()


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (0, ["damaged"]),
        (100, ["damaged"]),
        (700, ["no picture", "damaged"]),
        (1100, ["no picture", "damaged"]),
        (1560, ["unreadable", "damaged"]),
        (1700, ["whole", "damaged"]),
        (2048, ["whole", "damaged"]),
        (2100, ["whole", "damaged"]),
    ],
)
def test_shards_that_are_cut(tmp_path, cut, expected):
    """What comes before the cut is used."""
    path = pack(tmp_path / "a.tar", {"1.txt": "one", "1.png": png("red"), "2.txt": "two", "2.png": png("red")})
    path.write_bytes(path.read_bytes()[:cut])
    pack(tmp_path / "b.tar", {"1.txt": "one", "1.png": png("red")})
    *items, last = open_source(tmp_path)
    assert last.key == "b.tar/1" and decode_image(last.read())
    found = []
    for item in items:
        if isinstance(item, Skip):
            found.append(item.reason.split(",")[0])
            continue
        try:
            found.append("whole" if decode_image(item.read()) else "")
        except UnreadableImage:
            found.append("unreadable")
    assert found == expected


def test_a_shard_with_a_hole(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{n}.{kind}": png("red") for n in range(4) for kind in ("png", "txt")})
    data = bytearray(path.read_bytes())
    data[4096:4608] = b"x" * 512
    path.write_bytes(data)
    assert [item.key for item in open_source(path)][-1] == "a.tar"
    assert "it breaks off at byte 4096" in list(open_source(path))[-1].reason


def test_what_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(os.urandom(3000))
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.png"))
    keys = [(item.key, type(item)) for item in open_source(tmp_path)]
    assert keys == [("a.tar", Skip), ("b.tar", Skip)]


# ---- the library datasets


class Picture:
    def __init__(self, decode: bool = True):
        self.decode = decode


class ClassLabel:
    def __init__(self, names: list[str]):
        self.names = names

    def int2str(self, number: int) -> str:
        return self.names[number]


class Table(list):
    """As much of `datasets.Dataset` as we use."""

    def __init__(self, rows: list[dict], features: dict):
        super().__init__(rows)
        self.features = features

    def cast_column(self, name: str, kind: Picture) -> Table:
        assert list(self.features) == [name] and isinstance(self.features[name], Picture) and not kind.decode
        return self

    def select_columns(self, names: list[str]) -> Table:
        return Table([{name: row[name] for name in names} for row in self], {n: self.features[n] for n in names})

    def remove_columns(self, names: list[str]) -> Table:
        return self.select_columns([name for name in self.features if name not in names])


@pytest.fixture
def library(monkeypatch) -> ModuleType:
    """A stand-in for `datasets`, whose two functions give what is in `tables`."""
    module = ModuleType("datasets")
    module.Image, module.ClassLabel, module.tables = Picture, ClassLabel, {}

    def load_dataset(name: str, split: str) -> Table:
        return module.tables[name, split]

    module.load_dataset = load_dataset
    module.load_from_disk = lambda folder: module.tables[Path(folder).name]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def inside(colour: str) -> dict:
    return {"bytes": png(colour), "path": "somewhere.png"}


def test_hub_datasets(library, tmp_path):
    (tmp_path / "out.png").write_bytes(png("blue"))
    rows = [
        {"id": 1, "photo": inside("red"), "text": "red"},
        {"id": 2, "photo": {"bytes": None, "path": str(tmp_path / "out.png")}, "text": None},
        {"id": 3, "photo": inside("lime"), "text": 5},
    ]
    library.tables["owner/name", "train"] = Table(rows, {"id": "int32", "photo": Picture(), "text": "string"})
    library.tables["owner/name", "validation"] = Table(rows[:1], {"photo": Picture(), "text": "string"})
    assert listed(open_source("hf:owner/name")) == [
        ("0", ("red",), COLOURS["red"]),
        ("1", (), COLOURS["blue"]),
        ("2", "its caption is not a text"),
    ]
    assert next(iter(open_source("hf:owner/name"))).row == {"id": 1, "text": "red"}
    assert open_source("hf:owner/name:validation").total == 1
    assert message("hf:owner/other").startswith("cannot load hf:owner/other: ")


def test_columns_of_hub_datasets(library):
    pictures = [inside("red")] * 3
    labels = [{"img": p, "label": n} for p, n in zip(pictures, (0, 1, None), strict=True)]
    library.tables["labels", "train"] = Table(labels, {"img": Picture(), "label": ClassLabel(["red_panda", "cat"])})
    assert [item[1] for item in listed(open_source("hf:labels"))] == [("red panda",), ("cat",), ()]
    lists = [{"img": pictures[0], "captions": ["a", "b"], "title": "t", "label": 1}]
    kinds = {"img": Picture(), "captions": "list", "title": "string", "label": ClassLabel(["x", "y"])}
    library.tables["lists", "train"] = Table(lists, kinds)
    assert [item[1] for item in listed(open_source("hf:lists"))] == [("a", "b")]
    assert [item[1] for item in listed(open_source("hf:lists", "title"))] == [("t", "a", "b")]
    assert [item[1] for item in listed(open_source("hf:lists", "label"))] == [("y",)]
    assert message("hf:lists", "name") == "hf:lists has no column name, only img, captions, title, label"
    library.tables["none", "train"] = Table([], {"text": "string"})
    assert message("hf:none") == "hf:none has no column of pictures, only text"
    library.tables["none", "train"] = Table([], {"img": Picture(), "n": "int"})
    assert message("hf:none").endswith("only img, n; name it with --caption-column")
    library.tables["gaps", "train"] = Table([{"img": None, "text": "x"}], {"img": Picture(), "text": "string"})
    with pytest.raises(UnreadableImage, match="there is no picture"):
        next(iter(open_source("hf:gaps"))).read()


def test_saved_datasets(library, tmp_path):
    table = Table([{"image": inside("red"), "text": "red"}], {"image": Picture(), "text": "string"})
    library.tables["saved"] = table
    library.tables["several"] = {"train": table}
    library.tables["other"] = {"test": table}
    write(
        tmp_path, {"saved/dataset_info.json": "{}", "several/dataset_dict.json": "{}", "other/dataset_dict.json": "{}"}
    )
    for name in ("saved", "several"):
        assert listed(open_source(tmp_path / name)) == [("0", ("red",), COLOURS["red"])]
    assert message(tmp_path / "other").endswith("other holds the splits test; give the folder of one of them")
    del library.tables["saved"]
    assert message(tmp_path / "saved").startswith(f"cannot load {tmp_path / 'saved'}: ")


@pytest.mark.parametrize("there", [None, ModuleType("datasets")])
def test_without_the_library(monkeypatch, tmp_path, there):
    monkeypatch.setitem(sys.modules, "datasets", there)
    write(tmp_path, {"dataset_info.json": "{}"})
    assert message("hf:x") == "reading hf:x needs the library datasets: pip install datasets"
    assert message(tmp_path) == f"reading {tmp_path} needs the library datasets: pip install datasets"


def test_which_field_holds_the_caption():
    assert captions_of({"text": "a", "caption": "b", "captions": ["a", " c "]}) == ("a", "c")
    assert captions_of({"caption": "b", "prompt": "c"}) == ("b",)
    assert captions_of({"prompt": ["c", "d"]}) == ("c", "d")
    assert captions_of({"title": "t", "text": "a"}, "title") == ("t",)
    assert captions_of({}) == captions_of({"text": None, "captions": None}) == ()
    with pytest.raises(TypeError):
        captions_of({"text": {"en": "a"}})


# ---- splits in folders of their own


@pytest.mark.parametrize("index", ["metadata.jsonl", "metadata.csv"])
def test_metadata_one_level_down(tmp_path, index):
    def lines(caption: str) -> str:
        if index.endswith("csv"):
            return f"file_name,text\n0.png,{caption}\n"
        return json.dumps({"file_name": "0.png", "text": caption})

    parts = {"train": "a fox", "test": "a hen", "val": "an owl", "more": "a cow"}
    for name, caption in parts.items():
        write(tmp_path / name, {"0.png": png("red"), index: lines(caption)})
    items = list(open_source(tmp_path))
    assert {item.key: (item.captions, item.split) for item in items} == {
        "more/0.png": (("a cow",), "train"),
        "test/0.png": (("a hen",), "test"),
        "train/0.png": (("a fox",), "train"),
        "val/0.png": (("an owl",), "validation"),
    }
    assert open_source(tmp_path).total == 4
    assert [image.caption for image in find_images([tmp_path], "train")] == ["a cow", "a fox"]


def test_a_line_says_its_split_before_the_folder(tmp_path):
    rows = [{"file_name": "0.png", "text": "x", "split": "autoencoder"}, {"file_name": "0.png", "text": "y"}]
    write(tmp_path / "test", {"0.png": png("red"), "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert [item.split for item in open_source(tmp_path)] == ["autoencoder", "test"]


def test_splits_without_metadata(tmp_path):
    for split in ("Train", "test"):
        write(tmp_path / "classes" / split / "cat", {"0.png": png("red")})
        write(tmp_path / "texts" / split, {"0.png": png("red"), "0.txt": f"of {split}"})
        write(tmp_path / "none" / split, {"0.png": png("red")})
        (tmp_path / "shards" / split).mkdir(parents=True)
        pack(tmp_path / "shards" / split / "0.tar", {"0.png": png("red"), "0.txt": "a cat"})

    def found(name: str) -> list[tuple]:
        return [(item.key, item.captions, item.split) for item in open_source(tmp_path / name)]

    assert found("classes") == [("Train/cat/0.png", ("cat",), "train"), ("test/cat/0.png", ("cat",), "test")]
    assert found("texts") == [("Train/0.png", ("of Train",), "train"), ("test/0.png", ("of test",), "test")]
    assert found("shards") == [("Train/0.tar/0", ("a cat",), "train"), ("test/0.tar/0", ("a cat",), "test")]
    assert "Train has 1 pictures but no captions" in message(tmp_path / "none")
    assert len(find_images([tmp_path / "none"])) == 2
    assert len(find_images([tmp_path / "none"], "test")) == 1


def test_pictures_beside_folders_with_metadata(tmp_path):
    write(tmp_path, {"loose.png": png("red"), "train/0.png": png("red"), "train/metadata.jsonl": ""})
    assert "has pictures (loose.png) beside folders with metadata (train)" in message(tmp_path)


# ---- nothing outside of the folder, and regular files only


def problems(data: Path) -> dict[str, str]:
    """Why samples cannot be used; "" if they can."""
    found = {}
    for item in open_source(data):
        try:
            found[item.key] = item.reason if isinstance(item, Skip) else item.read() and ""
        except OSError as error:
            found[item.key] = error.strerror
    return found


OUT = "it leads out of the folder: copy it there"


def test_metadata_that_leads_out(tmp_path):
    folder = tmp_path / "data"
    write(tmp_path, {"secret.png": png("red"), "data/in.png": png("blue")})
    (folder / "in-too.png").symlink_to("in.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    absolute = str(tmp_path / "secret.png")
    names = ["in.png", "../secret.png", absolute, "link.png", "in-too.png", "/dev/zero", "sub/../in.png"]
    (folder / "sub").mkdir()
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": "x"}) + "\n" for n in names))
    expected = dict.fromkeys(["../secret.png", absolute, "link.png", "/dev/zero"], OUT)
    assert problems(folder) == dict.fromkeys(names, "") | expected
    with pytest.warns(UserWarning, match="skipped 4"):
        assert len(ImageFolder.read(folder, size=4)) == 3


def test_metadata_with_names_that_are_none(tmp_path):
    names = ["a\0b.png", "\ud800.png", "a" * 5000]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": "x"}) + "\n" for n in names))
    reasons = ["that is no name of a file"] * 2 + ["File name too long"]
    assert list(problems(tmp_path).values()) == reasons
    for image, reason in zip(find_images([tmp_path]), reasons, strict=True):
        with pytest.raises(StarflowError, match=reason):
            image.open()


def test_metadata_that_is_a_link_out_of_the_folder(tmp_path):
    write(tmp_path, {"passwd": "root:x:0:0", "data/0.png": png("red")})
    (tmp_path / "data/metadata.jsonl").symlink_to(tmp_path / "passwd")
    assert message(tmp_path / "data") == f"cannot read {tmp_path}/data/metadata.jsonl: {OUT}"


def test_links_out_of_the_folder(tmp_path):
    files = {f"data/{name}.png": png("red") for name in "abc"} | {"data/a.txt": "a", "other/d.png": png("red")}
    write(tmp_path, {**files, "secret.txt": "root:x:0:0"})
    folder = tmp_path / "data"
    (folder / "b.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "c.txt").symlink_to("a.txt")
    (folder / "d.png").symlink_to(tmp_path / "other/d.png")
    (folder / "more").symlink_to(tmp_path / "other")
    (folder / "round").symlink_to(".")
    assert problems(folder) == {
        "a.png": "", "c.png": "", "b.png": f"its .txt cannot be read: {OUT}", "d.png": OUT,
        "more": "a link out of the data: copy it there", "round": "a link to another folder of the data",
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"skipped 4: more \(a link out of the data"):
        assert ImageFolder.read(folder, size=4).captions == [["a"], ["a"]]


def test_a_folder_of_links_alone(tmp_path):
    write(tmp_path, {"other/d.png": png("red")})
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cats").symlink_to(tmp_path / "other")
    assert "skipped 1: cats (a link out of the data: copy it there)" in message(tmp_path / "data")


def test_a_shard_that_is_a_link_out_of_the_folder(tmp_path):
    pack(tmp_path / "0.tar", {"0.png": png("red"), "0.txt": "a"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data/0.tar").symlink_to(tmp_path / "0.tar")
    assert "is a link that leads out of" in message(tmp_path / "data")


def test_pipes_are_no_pictures(tmp_path):
    folder = write(tmp_path, {"a.png": png("red"), "a.txt": "a", "c.png": png("red")})
    for name in ("b.png", "c.txt"):
        os.mkfifo(folder / name)
    (folder / "b.txt").write_text("b")
    reason = "it is not a regular file"
    assert problems(folder) == {"a.png": "", "b.png": reason, "c.png": f"its .txt cannot be read: {reason}"}
    assert "is neither a folder nor a regular file" in message(folder / "b.png")
    assert "is neither a folder nor a regular file" in message("/dev/zero")


def test_texts_that_are_no_captions(tmp_path):
    folder = write(tmp_path, {f"{name}.png": png("red") for name in "abc"})
    write(folder, {"a.txt": "a" * (1 << 20), "b.txt": "a" * ((1 << 20) + 1), "c.txt": "ü".encode("utf-16")})
    found = problems(folder)
    assert found == {
        "a.png": "", "b.png": "its .txt cannot be read: it is larger than 1048576 bytes",
        "c.png": "its .txt is not UTF-8",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-that-name/x", "a\0b"])
def test_names_that_are_none(name):
    assert message(name)


def test_outputs_in_the_data_are_left_out(tmp_path):
    write(tmp_path, {"red/0.png": png("red"), "blue/0.png": png("blue")})
    write(tmp_path / "model", {"config.json": "{}", "model.safetensors": "", "samples.png": png("red")})
    write(tmp_path / "begun/training", {"config.yaml": "", "flow/log.jsonl": "", "flow/samples/0.png": png("red")})
    write(tmp_path / "tuned", {"config.yaml": "", "checkpoints/log.jsonl": "", "grid.png": png("red")})
    assert [item.key for item in open_source(tmp_path)] == ["blue/0.png", "red/0.png"]
