"""Times of tokens and words."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m3asr.decode import token_times, word_times


def test_token_times_meet_midway_and_stay_within_half_a_second():
    assert token_times([]) == []
    assert token_times([0]) == [(0.0, 0.5)]
    spans = token_times([10, 15, 60], duration=2.6)
    np.testing.assert_allclose(spans, [(0.0, 0.5), (0.5, 1.1), (1.9, 2.6)])
    np.testing.assert_allclose(token_times([10, 60], frame_shift=0.06), [(0.1, 1.1), (3.1, 4.1)])


@given(st.lists(st.integers(0, 500), unique=True, max_size=20))
def test_token_times_are_in_order(frames):
    spans = token_times(sorted(frames), duration=20.1)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges)
    assert all(end - start <= 1.0 + 1e-9 and 0 <= start <= end <= 20.1 for start, end in spans)


def test_words_take_the_times_of_their_tokens():
    spans = [(0.0, 0.2), (0.2, 0.5), (0.5, 0.6), (0.9, 1.0)]
    words = word_times([("hello", 0, 2), ("you", 3, 4)], spans, [0.9, 0.5, 0.1, 0.8])
    assert [(w.text, w.start, w.end, w.confidence) for w in words] == [("hello", 0.0, 0.5, 0.5), ("you", 0.9, 1.0, 0.8)]
    assert word_times([("hello", 0, 2)], spans)[0].confidence is None
    assert word_times([], []) == []
