"""Inputs so small that every alignment can be summed, and the search of one utterance."""

import math

from hypothesis import strategies as st
from plain_decoding import log_softmax

from m3asr.decode import ctc_prefix_beam_search


def search(log_probs, beam_size=10, **options):
    return ctc_prefix_beam_search(log_probs[None], [len(log_probs)], beam_size, **options)[0]


@st.composite
def tiny_log_probs(draw):
    """(S <= 5, V <= 3): every kind of frame, also with symbols of probability zero."""
    frames, vocab = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    logit = st.one_of(st.floats(-6, 6), st.just(-math.inf))
    rows = draw(st.lists(st.lists(logit, min_size=vocab, max_size=vocab), min_size=frames, max_size=frames))
    return log_softmax([row if max(row) > -math.inf else [0.0] * vocab for row in rows])
