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

    Of a link, the file that it leads to. A device or a pipe (/dev/null, /dev/stdout) is written to as it is. Raises
    M3asrError where the system refuses.
    """
    real = Path(os.path.realpath(path))
    aside = real.with_name(f".{real.name}.{os.getpid()}.part")
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            yield Path(path)
        else:
            yield aside
            os.replace(aside, real)
    except OSError as error:
        raise M3asrError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # where a folder of the path is a file, this is refused too
            aside.unlink()
