"""Which tokens may come next, so that an answer to `detect` or `segment` holds no malformed box.

A constraint is asked before each token, with the one before it, and says what may win: a range of ids, for
which the graphs have an input, or a few ids, of which the decoding loop takes the likeliest. Knows no
model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paliedge.backends.session import IdRange
from paliedge.bundle.manifest import CODES_PER_MASK, Tokens

AllowedTokens = IdRange | frozenset[int]
TokenConstraint = Callable[[int | None], AllowedTokens]
"""The token that was chosen last (None before the first) -> what may come next."""


def allow_all(tokens: Tokens) -> TokenConstraint:
    """Every token may come at any time."""
    return lambda token: (0, tokens.vocab_size - 1)


class BoxConstraint:
    """Boxes are whole, and where masks are asked for each box has one.

    | so far | next |
    |---|---|
    | nothing, or text | text, the end, or y1 of a box |
    | y1, y1 x1, y1 x1 y2 | x1, y2 > y1, x2 > x1 |
    | a box, with `masks` | 16 segmentation tokens |
    | box (and mask) | its label: text, or one of `labels` |
    | one of `labels` | the end, or the separator and then y1 of a box |

    Location tokens must lie behind all text and before the segmentation tokens, as PaliGemma's do.

    Args:
        tokens: the bundle's token ids.
        masks: each box has a mask.
        labels: ids of each label that is allowed; None allows any text.
        separator: ids between two boxes, for `labels`.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        masks: bool,
        labels: Sequence[Sequence[int]] | None = None,
        separator: Sequence[int] = (),
    ) -> None:
        self._tokens = tokens
        self._head = 4 + (CODES_PER_MASK if masks else 0)
        self._labels = labels
        self._separator = list(separator)
        self._record: list[int] = []

    def __call__(self, token: int | None) -> AllowedTokens:
        first = self._tokens.first_location
        last = first + self._tokens.num_locations - 1
        if token is not None and (self._record or first <= token <= last):
            begins = first <= token <= last and not 0 < len(self._record) < 4
            self._record = [token] if begins else [*self._record, token]
        filled = len(self._record)
        if filled == 0:
            return 0, last - 1  # nothing lies below a box that begins in the last bin
        if filled == 1:
            return first, last - 1
        if filled < 4:
            return self._record[filled - 2] + 1, last
        if filled < self._head:
            begin = self._tokens.first_segmentation
            return begin, begin + self._tokens.num_segmentations - 1
        if self._labels is not None:
            return self._continue_label(self._labels, self._record[self._head :])
        return 0, first - 1 if filled == 4 else last - 1  # eight location tokens in a row would be one group

    def _continue_label(self, labels: Sequence[Sequence[int]], said: list[int]) -> AllowedTokens:
        choices: set[int] = set()
        for label in labels:
            whole = [*label, *self._separator]
            if said == whole:
                first = self._tokens.first_location
                return first, first + self._tokens.num_locations - 2
            if said == whole[: len(said)]:
                choices.add(whole[len(said)])
            if said == list(label):
                choices.add(self._tokens.eos)
        return frozenset(choices)
