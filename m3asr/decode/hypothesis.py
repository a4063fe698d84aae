"""What decoding returns: plain Python numbers only, so that a result goes straight into JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Hypothesis:
    """One token sequence. Scores are natural logarithms; `score` is what the n-best list is ordered by."""

    tokens: list[int]
    score: float
    confidence: float = 0.0  # 0..1, for the whole hypothesis; each search says how it is made
    tokens_confidence: list[float] | None = None  # 0..1 for each token
    times: list[int] | None = None  # the encoder frame of each token's peak, counted from 0
    ctc_score: float | None = None  # log-probability of the tokens under CTC, without context or language model
    attention_score: float | None = None  # log-probability under the attention decoder, </s> included


@dataclass
class DecodeResult:
    """The hypotheses of one utterance, best first; never empty. The best one's fields are at hand as attributes."""

    nbest: list[Hypothesis]

    @property
    def tokens(self) -> list[int]:
        return self.nbest[0].tokens

    @property
    def score(self) -> float:
        return self.nbest[0].score

    @property
    def confidence(self) -> float:
        return self.nbest[0].confidence

    @property
    def tokens_confidence(self) -> list[float] | None:
        return self.nbest[0].tokens_confidence

    @property
    def times(self) -> list[int] | None:
        return self.nbest[0].times

    def as_dict(self) -> dict:
        """The best hypothesis's fields and `nbest`, ready for `json.dumps`."""
        nbest = [asdict(hypothesis) for hypothesis in self.nbest]
        return {**nbest[0], "nbest": nbest}
