"""The errors a user can cause. Each message is one sentence: what was found, what was expected, what to do.

M3asrError
├── AudioError      a recording cannot be read or holds no usable samples
├── ModelError      a checkpoint, model folder or engine cannot be used
│   └── NotANumber  an engine's outputs hold NaN
└── MissingExtra    an optional package is not installed
"""


class M3asrError(Exception):
    """Base of all errors raised for bad input; the command line prints the message and exits with 2."""


def reason(error: Exception) -> str:
    """What went wrong, for a sentence that begins with the file's name, which the system would name again."""
    return getattr(error, "strerror", None) or str(error)


class AudioError(M3asrError):
    """A recording cannot be read or holds no usable samples."""


class ModelError(M3asrError):
    """A checkpoint, a model folder, a feature file or an engine does not fit."""


class NotANumber(ModelError, ValueError):
    """An engine's outputs hold NaN."""

    def __init__(self):
        super().__init__(
            "the log-probabilities hold NaN: expected finite numbers; if the engine computes in fp16, build it with "
            "--precision bf16 or fp32, whose range is larger, else convert the model again"
        )


class MissingExtra(M3asrError):
    """A feature needs a package that is not installed."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs the extra '{extra}': pip install 'm3asr[{extra}]'")
        self.extra = extra
