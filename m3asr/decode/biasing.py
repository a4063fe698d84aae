"""Context biasing: phrases whose tokens get a bonus in the prefix beam search (specification 3.3)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class _Node:
    """A prefix of one or more phrases; `value` is the bonus of its tokens, `completed` that of phrases ending here."""

    __slots__ = ("children", "completed", "fail", "is_end", "moves", "reward", "top", "value")

    def __init__(self, reward: float = 0.0):
        self.children: dict[int, _Node] = {}
        self.reward = reward  # bonus of this node's own token
        self.value = 0.0
        self.is_end = False
        self.completed = 0.0
        self.fail: _Node | None = None  # the longest proper suffix that is a prefix of a phrase
        self.moves: dict[int, tuple[float, _Node]] | None = None  # made when the search first gets here
        self.top = 0.0


class ContextGraph:
    """Phrases to favour, as an Aho-Corasick automaton (Aho and Corasick, 1975) over token ids.

    phrases: token ids of each phrase; score: bonus per matched token, one for all or one for each phrase.

    While a phrase is being matched, each token adds its bonus; when it is complete, the bonus of all its tokens is
    added once more; when the match is left, the bonus of the tokens that led there is taken back. In total a complete
    phrase of n tokens earns n * score, an abandoned one nothing.

    `original=True` reproduces WeNet where it departs from that:
    - at the end of the utterance it replaces the accumulated bonus by minus the bonus of the tokens being matched,
      instead of adding that, and does not rank again. So the ranking still holds the bonus of phrases left unfinished
      (a half-spoken name can win), while the scores, which rescoring uses, have lost the bonus of every phrase.
    - a phrase that is the beginning of one listed before it is not recognised as complete.
    """

    def __init__(self, phrases: Sequence[Sequence[int]], score: float | Sequence[float] = 6.0, original: bool = False):
        scores = [float(score)] * len(phrases) if isinstance(score, int | float) else [float(x) for x in score]
        if len(scores) != len(phrases):
            raise ValueError(f"expected one score for each of the {len(phrases)} phrases, got {len(scores)}")
        self.original = original
        self._root = _Node()
        for tokens, reward in zip(phrases, scores, strict=True):
            self._add(tokens, reward)
        self._link()

    def _add(self, tokens: Sequence[int], reward: float) -> None:
        if not len(tokens):
            raise ValueError("a phrase without tokens cannot be favoured")
        node, new = self._root, False
        for token in map(int, tokens):
            new = token not in node.children
            node = node.children.setdefault(token, _Node(reward))
            node.reward = max(node.reward, reward)
        if new or not self.original:
            node.is_end = True

    def _link(self) -> None:
        """Breadth first, so that a node's suffixes, which are shorter, are finished before it."""
        root = self._root
        queue = deque([root])
        while queue:
            node = queue.popleft()
            for token, child in node.children.items():
                fail = node.fail
                while fail is not None and token not in fail.children:
                    fail = fail.fail
                child.fail = fail.children[token] if fail is not None else root
                child.value = node.value + child.reward
                child.completed = child.fail.completed + (child.value if child.is_end else 0.0)
                queue.append(child)

    def start(self) -> _Node:
        return self._root

    def step(self, state: _Node, token: int) -> tuple[float, _Node]:
        """Bonus for appending `token`, negative where a match is abandoned, and the state after it."""
        move = self._moves(state).get(token)
        return move if move is not None else (-state.value, self._root)

    def finish(self, state: _Node) -> float:
        """The unfinished match's bonus is taken back."""
        return -state.value

    def max_gain(self, state: _Node) -> float:
        self._moves(state)
        return state.top

    def _moves(self, state: _Node) -> dict[int, tuple[float, _Node]]:
        """All tokens that lead anywhere but to the root. Kept, because a search asks for the same few states."""
        if state.moves is None:
            moves, node = {}, state
            while node is not None:
                for token, child in node.children.items():
                    moves.setdefault(token, (child.value - state.value + child.completed, child))
                node = node.fail
            state.top = max([-state.value, *(gain for gain, _ in moves.values())])
            state.moves = moves  # last: other threads may search with the same graph
        return state.moves
