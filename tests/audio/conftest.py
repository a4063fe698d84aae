"""Damage that no test expects is an error in all of them."""

import warnings

import pytest

from m3asr.audio import DamagedAudio


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DamagedAudio)
        yield
