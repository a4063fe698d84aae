"""Log-probabilities of any engine -> token ids with scores, times and confidences. Plain numpy, no network inside."""

from m3asr.decode.align import ctc_alignment
from m3asr.decode.attention import AttentionDecoder, attention_rescoring, attention_search
from m3asr.decode.biasing import ContextGraph
from m3asr.decode.ctc import PrefixBeamSearch, Scorer, ctc_best_path, ctc_greedy_search, ctc_prefix_beam_search
from m3asr.decode.hypothesis import DecodeResult, Hypothesis
from m3asr.decode.joint import joint_search
from m3asr.decode.ngram import NgramLM
from m3asr.decode.options import DECODERS, DecodeOptions
from m3asr.decode.times import Word, token_times, word_times

__all__ = [
    "AttentionDecoder",
    "ContextGraph",
    "DECODERS",
    "DecodeOptions",
    "DecodeResult",
    "Hypothesis",
    "NgramLM",
    "PrefixBeamSearch",
    "Scorer",
    "Word",
    "attention_rescoring",
    "attention_search",
    "ctc_alignment",
    "ctc_best_path",
    "ctc_greedy_search",
    "ctc_prefix_beam_search",
    "joint_search",
    "token_times",
    "word_times",
]
