"""A file that is whole or not there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from m3asr.errors import M3asrError, reason

_DEVICES = Path("/dev"), Path("/dev/fd")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name when the block ends well, and is removed when it does not.

    A link stays one: the file that it leads to is replaced. What is there and is no file (/dev/null, a pipe) is itself
    written to. Raises M3asrError for a directory and where the system refuses.
    """
    target, aside = _places(Path(path))
    try:
        yield aside
        if aside != target:
            os.replace(aside, target)
    except OSError as error:
        raise _refused(path, error) from None
    finally:
        if aside != target:
            with suppress(OSError):  # gone by its new name, or refused as the writing was
                aside.unlink()


def need_place(path: str | Path | None, inputs: Iterable[str | Path] = ()) -> None:
    """Raises M3asrError where `whole_file` would, before the work whose result goes there. None: none does.

    inputs: what the work reads, which must not be replaced either: `-o *.wav` names a recording.
    """
    if path is None:
        return
    target, aside = _places(Path(path))
    if aside == target:
        return
    for source in inputs:
        if os.path.exists(target) and os.path.exists(source) and os.path.samefile(target, source):
            raise M3asrError(f"{path} is to be read and the result would replace it: expected another name to write to")
    try:
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise _refused(path, error) from None


def _places(path: Path) -> tuple[Path, Path]:
    """Where the bytes belong, and where they are written first: the same place for what must not be replaced."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        kind = stat.S_IFREG
    except (OSError, ValueError) as error:  # a name too long, a link to itself; a zero byte
        raise _refused(path, error) from None
    if stat.S_ISDIR(kind):
        raise M3asrError(f"{path} is a directory; expected the name of a file to write")
    # Replacing a device would destroy it, as root may; /dev/stdout is a file where the shell redirects to one.
    if path.parent in _DEVICES or not stat.S_ISREG(kind):
        return path, path
    target = path.resolve()
    return target, target.with_name(f".{target.name}.{os.getpid()}.part")


def _refused(path: str | Path, error: Exception) -> M3asrError:
    return M3asrError(f"{path} cannot be written: {reason(error)}")
