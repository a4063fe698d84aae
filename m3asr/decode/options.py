"""The settings of decoding, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from m3asr.errors import M3asrError

DECODERS = ("greedy", "beam", "rescoring", "joint", "attention")
WITH_BEAM = ("beam", "rescoring", "joint")  # decoders that take phrases and a language model
# What a language model counts beside CTC alone, and its bonus; and beside CTC and the attention decoder together.
LM_WEIGHT, LM_BONUS = 0.15, 0.25
JOINT_LM_WEIGHT, JOINT_LM_BONUS = 0.3, 0.5
NO_LM = "none"


@dataclass(frozen=True)
class DecodeOptions:
    """How log-probabilities become tokens.

    decoder: "greedy", "beam" (CTC prefix beam search), "rescoring" (its n-best list ranked again by the attention
    decoder), "joint" (a search with CTC and the attention decoder together, which begins where rescoring ends: fewer
    errors, several times the work), "attention" (beam search with the attention decoder alone, without times of words),
    or None for joint where the model has an attention decoder (rescoring in a stream), else beam.
    beam_size: hypotheses kept; nbest: how many of them a transcript shows, 1 none but the best.
    ctc_weight, reverse_weight: of CTC and of the right-to-left decoder in rescoring and joint; None takes the model's
    own.
    blank_penalty: taken from the blank's logit; above 0 it makes deletions rarer. All decoders but attention.
    hotwords: phrases to favour; each of their tokens that is matched adds hotword_score. Beam,
    rescoring and joint.
    lm: an n-gram language model, ARPA or KenLM binary, whose log-probabilities count lm_weight, plus lm_bonus for each
    unit (None: 0.3 and 0.5 in joint, half of that in the others): "word" or "token" says what its entries are. Beam,
    rescoring and joint; KenLM's binary needs the extra `lm`. None takes the model's own, of words, if its folder has
    one (lm.npz), and "none" takes none.

    Raises M3asrError for values outside their range, and for what the chosen decoder cannot use.
    """

    decoder: str | None = None
    beam_size: int = 10
    ctc_weight: float | None = None
    reverse_weight: float | None = None
    blank_penalty: float = 0.0
    nbest: int = 1
    hotwords: tuple[str, ...] = ()
    hotword_score: float = 3.0
    lm: str | None = None
    lm_weight: float | None = None
    lm_bonus: float | None = None
    lm_unit: str = "word"

    def __post_init__(self):
        if self.decoder is not None and self.decoder not in DECODERS:
            raise M3asrError(f"there is no decoder {self.decoder!r}; choose one of {', '.join(DECODERS)}")
        if self.beam_size < 1:
            raise M3asrError(f"beam size is {self.beam_size}, expected at least 1")
        if self.nbest < 1:
            raise M3asrError(f"nbest is {self.nbest}, expected at least 1")
        if self.nbest > 1 and self.decoder == "greedy":
            raise M3asrError("greedy decoding has one hypothesis: for nbest choose another decoder")
        if self.nbest > self.beam_size:
            raise M3asrError(f"nbest is {self.nbest}, more than the beam size {self.beam_size}: raise that")
        for name in ("ctc_weight", "reverse_weight"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise M3asrError(f"{name} is {value}, expected 0 to 1")
        for name in ("blank_penalty", "hotword_score", "lm_weight", "lm_bonus"):
            value = getattr(self, name)
            if value is not None and not -100.0 <= value <= 100.0:  # also refuses NaN
                raise M3asrError(f"{name} is {value}, expected -100 to 100")
        if isinstance(self.hotwords, str):
            raise M3asrError("hotwords is one text, expected several phrases")
        object.__setattr__(self, "hotwords", tuple(self.hotwords))
        if self.lm_unit not in ("word", "token"):
            raise M3asrError(f"lm_unit is {self.lm_unit!r}, expected word or token")
        if self.lm_unit == "token" and self.lm in (None, NO_LM):
            raise M3asrError("lm_unit is token, but there is no lm to count them: name its file, or leave lm_unit out")
        if self.decoder not in (None, *WITH_BEAM):
            for name in ("hotwords", "lm", "lm_weight", "lm_bonus"):
                if getattr(self, name) not in (None, (), NO_LM):
                    raise M3asrError(f"the decoder {self.decoder} takes no {name}: choose beam, rescoring or joint")
        if self.decoder == "attention" and self.blank_penalty:
            raise M3asrError("the decoder attention has no blank, so no blank penalty")

    def lm_share(self, decoder: str) -> tuple[float, float]:
        """lm_weight and lm_bonus, for a decoder of WITH_BEAM."""
        joint = decoder == "joint"
        weight, bonus = (JOINT_LM_WEIGHT, JOINT_LM_BONUS) if joint else (LM_WEIGHT, LM_BONUS)
        return (
            weight if self.lm_weight is None else self.lm_weight,
            bonus if self.lm_bonus is None else self.lm_bonus,
        )
