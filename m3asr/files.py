"""A file that is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from m3asr.errors import M3asrError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name when the block ends well, and is removed when it does not.

    Raises M3asrError where the system refuses.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise M3asrError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # where a folder of the path is a file, this is refused too
            aside.unlink()
