"""The files of a latent cache: appended to while it is made, committed step by step, checksummed at the end.

`unfinished.json` says how much of each file counts while the cache is being made; what a crash left beyond that is cut
off when it goes on. `cache.json`, with size and checksum of every file, takes its place when the cache is finished.
Both are replaced as a whole, and after what they speak of has reached the disk.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import inside, is_regular, read_json, replacing, sha256_of
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.transaction import locked

FORMAT = 1
MANIFEST, STATE = "cache.json", "unfinished.json"
INDEX, SKIPPED, TEXT_INDEX, TEXT = "index.jsonl", "skipped.txt", "text.jsonl", "text.bin"
REQUIRED = {"settings", "files", "buckets", "scale", "text_width"}
"""What readers take from a manifest."""

ADVICE = "; mend that and run the same command again: it goes on"

_DATA_FILE = re.compile(r"index\.jsonl|skipped\.txt|text\.jsonl|text\.bin|latents-\d+x\d+\.bin")


def latents_file(ratio: str) -> str:
    """The file of a bucket's latents."""
    return f"latents-{ratio.replace(':', 'x')}.bin"


def is_cache(folder: Path) -> bool:
    """Whether a folder holds a finished cache."""
    return is_regular(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`cache.json` of a finished cache. Raises StarflowError if the folder is not one."""
    if not is_cache(folder):
        if is_regular(folder / STATE):
            raise StarflowError(f"{folder} is not finished: run the command that makes it again, and it goes on")
        raise StarflowError(f"{folder} is not a latent cache: make one with mlx-starflow cache DATA -o {folder}")
    manifest = read_json(inside(folder, MANIFEST))
    for name in manifest.get("files", ()) if isinstance(manifest.get("files"), dict) else ():
        inside(folder, name)
    if manifest.get("format") != FORMAT or not manifest.keys() >= REQUIRED:
        raise StarflowError(f"{folder} is a cache of another version, or damaged: make it again with --no-resume")
    return manifest


def damaged_files(folder: Path, manifest: Mapping[str, Any], *, contents: Callable[[str], bool]) -> list[str]:
    """Files whose size or, where `contents(name)` asks for it, checksum is not the manifest's."""
    found = []
    for name, expected in manifest["files"].items():
        path = inside(folder, name)
        try:
            intact = is_regular(path) and path.stat().st_size == expected["bytes"]
            if intact and contents(name):
                intact = sha256_of(path) == expected["sha256"]
        except OSError:
            intact = False
        if not intact:
            found.append(name)
    return found


@dataclass(frozen=True)
class Committed:
    """How far a cache on disk is.

    Attributes:
        items: samples and skips of the source that are done.
        source: checksum of their keys and captions.
        pictures_done: whether that is all of them.
        texts: captions that are done.
        cut: how many of these were longer than the model reads.
    """

    items: int = 0
    source: str | None = None
    pictures_done: bool = False
    texts: int = 0
    cut: int = 0


class CacheWriter:
    """Makes a cache, or goes on with one.

    Args:
        folder: of the cache; made if need be.
        settings: what it is made with. An unfinished or finished cache in the folder must have the same.
        resume: False: what is in the folder is thrown away.

    Attributes:
        progress: what the last `commit` said.
        finished: the manifest, if the cache is finished.

    Raises:
        StarflowError: another process writes there, the folder holds something else, or it cannot be written to; also
            from every method.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool = True):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.progress = Committed()
        self.finished: dict[str, Any] | None = None
        self._files: dict[str, BinaryIO] = {}
        with ExitStack() as stack:
            stack.enter_context(locked(folder))
            stack.callback(self._close_files)
            self._begin(resume)
            self._held = stack.pop_all()

    def _begin(self, resume: bool) -> None:
        manifest, state = self.folder / MANIFEST, self.folder / STATE
        found = _found(self.folder)
        _check_empty(self.folder, found)
        if found is None or not resume or not found.get("progress", True):
            self.forget()
            with self._writing(manifest):
                manifest.unlink(missing_ok=True)
            found = read_json(state)
        self._compare(found)
        if manifest.exists():
            self.finished = found
            state.unlink(missing_ok=True)
            return
        self.progress, sizes = self._state(found)
        for path in self._data_files():
            self._cut(path, sizes.pop(path.name, 0))
        if sizes:
            raise StarflowError(f"{self.folder} lacks {min(sizes)}; start again with --no-resume")

    def _state(self, found: Mapping[str, Any]) -> tuple[Committed, dict[str, int]]:
        """How far an unfinished cache is, and the sizes of its files."""
        try:
            done, sizes = Committed(**found["progress"]), dict(found["bytes"])
            counts = [done.items, done.texts, done.cut, *sizes.values()]
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise StarflowError(f"{self.folder / STATE} is damaged: start again with --no-resume") from None
        return done, sizes

    def _compare(self, found: Mapping[str, Any]) -> None:
        if found.get("format") != FORMAT:
            raise StarflowError(f"{self.folder} is a cache of another version: make it again with --no-resume")
        was = found["settings"]
        if not isinstance(was, dict):
            raise StarflowError(f"{self.folder} is damaged: make it again with --no-resume")
        changes = [
            f"another {key}" if isinstance(now, dict) else f"{key} {was.get(key)} -> {now}"
            for key, now in self.settings.items()
            if was.get(key) != now
        ]
        if changes:
            raise StarflowError(
                f"{self.folder} holds a cache made with other settings ({', '.join(changes)}): "
                "give another folder, or --no-resume to make it again"
            )

    def _cut(self, path: Path, size: int) -> None:
        with self._writing(path):
            if path.stat().st_size < size:
                raise StarflowError(f"{path} is shorter than it was: start again with --no-resume")
            if size:
                os.truncate(path, size)
            else:
                path.unlink()

    def read(self, name: str) -> bytes:
        """What has been written to a file so far."""
        path = self.folder / name
        return path.read_bytes() if path.exists() else b""

    def append(self, name: str, data: bytes) -> None:
        """Write to the end of a file. It counts when it is committed."""
        with self._writing(self.folder / name):
            if name not in self._files:
                # Unbuffered: what does not fit on the disk must fail here and not when the file is closed.
                self._files[name] = open(self.folder / name, "ab", buffering=0)  # noqa: SIM115
            rest = memoryview(data)
            while rest:
                rest = rest[self._files[name].write(rest) :]

    def commit(self, progress: Committed) -> None:
        """From here on what was appended counts, and `progress` is where to go on."""
        for name, file in self._files.items():
            with self._writing(self.folder / name):
                os.fsync(file.fileno())
        self._save_state(progress, {path.name: path.stat().st_size for path in self._data_files()})

    def forget(self) -> None:
        """Start from the beginning the next time. Until then the files stay, for a user to look at."""
        self._save_state(Committed(), {})

    def _save_state(self, progress: Committed, sizes: dict[str, int]) -> None:
        done = {} if progress == Committed() else asdict(progress)
        state = {"format": FORMAT, "settings": self.settings, "progress": done, "bytes": sizes}
        self._replace(self.folder / STATE, state)
        self.progress = progress

    def _data_files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if _DATA_FILE.fullmatch(path.name))

    def finish(self, facts: Mapping[str, Any], progress: Callable[[str], None] = lambda name: None) -> None:
        """Checksum what was committed and write the manifest: `facts`, the settings and the files."""
        files = {}
        for path in self._data_files():
            with self._writing(path):
                files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            progress(path.name)
        manifest = {"format": FORMAT, **facts, "settings": self.settings, "files": files}
        self._replace(self.folder / MANIFEST, manifest)
        (self.folder / STATE).unlink(missing_ok=True)
        self.finished = manifest

    def close(self) -> None:
        """Let go of the files. What was not committed is cut off the next time."""
        self._held.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replace(self, path: Path, content: Mapping[str, Any]) -> None:
        failure = f"cannot write {path}"
        with replacing(path, failure=failure, advice=ADVICE, overwrites_partial=True, sync=True) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StarflowError(f"cannot write {path}: {one_line(error)}{ADVICE}") from None


def check_cache_output(folder: Path, data: str | Path) -> None:
    """Raise StarflowError if a cache of `data` cannot be written to a folder: before the data is read."""
    check_outputs(folders=[folder], inputs=[data])
    if folder.is_dir():
        _check_empty(folder, _found(folder))


def _found(folder: Path) -> dict[str, Any] | None:
    """What the folder says of the cache in it."""
    return next((read_json(path) for path in (folder / MANIFEST, folder / STATE) if path.exists()), None)


def _check_empty(folder: Path, found: Mapping[str, Any] | None) -> None:
    """Raise StarflowError if there are files in a folder that are no cache's."""
    ours = found is not None and {"format", "settings"} <= found.keys()
    if not ours and (other := [path.name for path in folder.iterdir() if not path.name.startswith(".")]):
        raise StarflowError(f"{folder} holds other files ({min(other)}); give a new or an empty folder")
