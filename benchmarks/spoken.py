"""Text as it is spoken: figures, signs, abbreviations and capitals written out.

References are written as spoken ("nineteen eighty four", "p m", "mister"), and some recognisers write figures instead.
A figure has many readings, and which one was spoken cannot be told from it: of all of them the one nearest to the
reference is taken. That favours, if anybody, the recogniser that writes figures. Text without figures, signs,
abbreviations and words in capitals stays as it is.
"""

from __future__ import annotations

import re
from itertools import product

from m3asr.wer import count_errors, words

_DIGITS = "zero one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = ["", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split()]
_SCALES = ["", "thousand", "million", "billion"]
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
_ORDINALS |= {"twelve": "twelfth"}
_ZEROS = ("zero", "oh", "o")
_CURRENCIES = {"$": ("dollar", "cent"), "£": ("pound", "penny"), "€": ("euro", "cent")}
_SIGNS = {
    "mr": ["mister"],
    "mrs": ["missus", "misses"],
    "dr": ["doctor", "drive"],
    "st": ["saint", "street"],
    "jr": ["junior"],
    "vs": ["versus"],
    "etc": ["et cetera"],
    "ok": ["okay", "o k"],
    "am": ["a m"],
    "pm": ["p m"],
    "&": ["and"],
    "+": ["plus"],
    "@": ["at"],
    "=": ["equals"],
    "#": ["pound", "number", "hash"],
    "*": ["star"],
    "%": ["percent", "per cent"],
}
_PIECE = re.compile(
    r"(?P<number>(?P<currency>[$£€])?(?P<whole>\d+(?:,\d{3})*)(?:\.(?P<fraction>\d+))?"
    r"(?P<ending>(?:st|nd|rd|th|s)(?![a-z]))?(?P<percent>\s?%)?(?P<scale>\s(?:thousand|million|billion|trillion)\b)?)"
    r"|(?P<sign>(?<![A-Za-z'])(?:[Mm]rs?|[Dd]r|[Ss]t|[Jj]r|[Vv]s|[Ee]tc|[Oo][Kk]|[AaPp][Mm])(?![\w'])|[&+@=#*%])"
    r"|(?P<capitals>(?<![A-Za-z'])[A-Z]{2,}(?![A-Za-z']))"
)
# Figures with more readings than this are compared by the first ones.
_MOST = 500


def nearest_spoken(reference: str, hypothesis: str) -> str:
    """The hypothesis with each figure, sign, abbreviation and word in capitals in its reading nearest to the reference.

    Piece by piece, twice over, the others as chosen so far.
    """
    fixed, slots, end = [], [], 0
    for match in _PIECE.finditer(hypothesis):
        fixed.append(hypothesis[end : match.start()])
        slots.append([match[0], *dict.fromkeys(_readings(match))][:_MOST])
        end = match.end()
    fixed.append(hypothesis[end:])
    if not slots:
        return hypothesis
    wanted = words(reference)
    # A figure is not yet read: its first reading stands for it until its turn comes.
    chosen = [readings[1] if len(readings) > 1 else readings[0] for readings in slots]

    def text(i: int, reading: str) -> str:
        given = [*chosen[:i], reading, *chosen[i + 1 :]]
        return " ".join(part for pair in zip(fixed, [*given, ""], strict=True) for part in pair)

    for _ in range(2):
        for i, readings in enumerate(slots):
            chosen[i] = min(readings, key=lambda reading, i=i: count_errors(wanted, words(text(i, reading))).total)
    return text(0, chosen[0])


def _readings(match: re.Match) -> list[str]:
    if match["sign"]:
        return _SIGNS[match["sign"].lower()]
    if match["capitals"]:
        apart = " ".join(match["capitals"])
        return [match["capitals"], apart, *_SIGNS.get(match["capitals"].lower(), [])]
    whole, fraction = match["whole"].replace(",", ""), match["fraction"]
    read = readings_of(whole)
    if match["scale"]:
        if fraction:
            read = [f"{a} point {b}" for a, b in product(read, _one_by_one(fraction))]
        read = [a + match["scale"] for a in read]
        return [f"{a} {_CURRENCIES[match['currency']][0]}s" for a in read] if match["currency"] else read
    if fraction:
        parts = readings_of(fraction)
        points = [f"{a} point {b}" for a, b in product(read, _one_by_one(fraction))]
        together = [f"{a} {b}" for a, b in product(read, parts)]
        if match["currency"]:
            unit, cent = _CURRENCIES[match["currency"]]
            coins = [f"{a} {unit}s {join}{b} {cent}s" for a, b, join in product(read, parts, ("", "and "))]
            return [*coins, *(f"{a} {unit}s {b}" for a, b in product(read, parts)), *together, *points]
        read = [*points, *together]
    if match["currency"]:
        unit, _ = _CURRENCIES[match["currency"]]
        read = [f"{a} {unit}{plural}" for a, plural in product(read, ("s", ""))] + read
    if match["ending"] == "s":
        read = [_plural(a) for a in read]
    elif match["ending"]:
        read = [_ordinal(a) for a in read]
    if match["percent"]:
        read = [f"{a} {sign}" for a, sign in product(read, _SIGNS["%"])]
    return read


def readings_of(digits: str) -> list[str]:
    """What a row of digits can be called: "1906" -> one thousand nine hundred six, nineteen oh six, one nine ..."""
    found = []
    if digits == "0" or (digits[0] != "0" and len(digits) <= 3 * len(_SCALES)):
        plain = _cardinal(int(digits))
        found.append(plain)
        if "hundred " in plain or (len(digits) > 3 and " " in plain):
            found.append(re.sub(r"hundred (?!thousand|million|billion)", "hundred and ", plain))
            found.append(re.sub(r"(thousand) (?!.*hundred)", r"\1 and ", plain))
        if plain.startswith("one ") and len(digits) > 2:
            found += [f"a{reading[3:]}" for reading in found]
    if len(digits) > 2:
        start = len(digits) % 2
        pairs = [digits[i : i + 2] for i in range(start, len(digits), 2)]
        heads = [[_DIGITS[int(digits[0])]]] if start else []
        choices = [*heads, *map(_pair, pairs)]
        if len(pairs) <= 3:
            found += [" ".join(parts) for parts in product(*choices)]
    if digits == "00":
        found += ["o'clock", "hundred", ""]
    elif len(digits) == 2 and digits[0] == "0":
        found += [*_pair(digits), _DIGITS[int(digits[1])]]
    return list(dict.fromkeys([*found, *_one_by_one(digits)]))


def _one_by_one(digits: str) -> list[str]:
    zeros = _ZEROS if "0" in digits else ("",)
    return [" ".join(zero if d == "0" else _DIGITS[int(d)] for d in digits) for zero in zeros]


def _pair(digits: str) -> list[str]:
    if digits == "00":
        return ["hundred", *_one_by_one(digits)]
    return _one_by_one(digits) if digits[0] == "0" else [_cardinal(int(digits)), *_one_by_one(digits)]


def _cardinal(number: int) -> str:
    if not number:
        return "zero"
    parts = []
    for i, scale in enumerate(_SCALES):
        three = number // 1000**i % 1000
        if three:
            parts.insert(0, f"{_below_thousand(three)} {scale}".strip())
    return " ".join(parts)


def _below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    parts = [f"{_DIGITS[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        parts.append(f"{_TENS[rest // 10]} {_DIGITS[rest % 10] if rest % 10 else ''}".strip())
    elif rest >= 10:
        parts.append(_TEENS[rest - 10])
    elif rest:
        parts.append(_DIGITS[rest])
    return " ".join(parts)


def _ordinal(reading: str) -> str:
    head, _, last = reading.rpartition(" ")
    if last.endswith("y"):
        last = f"{last[:-1]}ieth"
    else:
        last = _ORDINALS.get(last, f"{last}th")
    return f"{head} {last}".strip()


def _plural(reading: str) -> str:
    if reading.endswith("y"):
        return f"{reading[:-1]}ies"
    return f"{reading}{'es' if reading.endswith('x') else 's'}"
