"""CLIP's tokenizer for a small tower that has rows for some of its tokens only."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from snella_jax.models.sd3.tokenizers import Tokenizer

SPARES = 8  # rows for words that are new to the tower


class Words:
    """Tokenizer whose ids are rows of a table: CLIP's tokens, spares, start and end.

    Attributes:
      clip: CLIP's tokenizer.
      ids: CLIP's ids of the rows but the spares, rising; start and end are the last.
      length: tokens of every text, start and end included.
      own: spare rows by the words that have them.
    """

    def __init__(
        self,
        clip: Tokenizer,
        ids: Sequence[int],
        length: int,
        own: Mapping[str, int] | None = None,
    ):
        self.clip, self.ids, self.length = clip, tuple(ids), length
        self.own = dict(own or {})
        self._row = dict(zip(self.ids[:-2], range(len(self.ids) - 2), strict=True))
        self._rows: dict[str, list[int]] = {}  # of the words met so far

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.ids) + SPARES

    def encode(self, text: str) -> list[int]:
        """Returns the rows of a text, between start and end.

        Raises:
          ValueError: a word has no row, or the text is too long.
        """
        found = [row for word in text.lower().split() for row in self._of(word)]
        if len(found) + 2 > self.length:
            raise ValueError(
                f"{text!r} has {len(found)} tokens: expected at most {self.length - 2}."
            )
        return [self.size - 2, *found, self.size - 1]

    def padded(
        self, texts: Sequence[str], length: int | None = None, pad: int | None = None
    ) -> Int[np.ndarray, "B length"]:
        """Returns the rows of texts, filled up with the end as those of CLIP-L are.

        Raises:
          ValueError: as `encode`.
        """
        length = self.length if length is None else length
        pad = self.size - 1 if pad is None else pad
        found = np.full((len(texts), length), pad, np.int32)
        for line, text in zip(found, texts, strict=True):
            rows = self.encode(text)
            line[: len(rows)] = rows
        return found

    def with_token(self, token: str) -> "Words":
        """Returns a tokenizer that has a spare row for each new word of `token`.

        Raises:
          ValueError: there are more new words than spare rows.
        """
        own = dict(self.own)
        for word in token.lower().split():
            if word not in own and not self._row.keys() >= set(self.clip.to_ids(word)):
                own[word] = len(self.ids) - 2 + len(own)
        if len(own) > SPARES:
            raise ValueError(
                f"--token {token}: more than {SPARES} words are new to the toy."
            )
        return Words(self.clip, self.ids, self.length, own)

    def _of(self, word: str) -> list[int]:
        """Returns the rows of a word."""
        if word in self.own:
            return [self.own[word]]
        if word not in self._rows:
            ids = self.clip.to_ids(word)
            if not self._row.keys() >= set(ids):
                raise ValueError(
                    f"The toy does not know the word {word!r}: it was trained on the "
                    "names of emoji. Choose another, or let it be the --token."
                )
            self._rows[word] = [self._row[one] for one in ids]
        return self._rows[word]


def vocabulary(clip: Tokenizer, texts: Iterable[str]) -> tuple[int, ...]:
    """Returns CLIP's ids that occur in texts, rising, then start and end."""
    words = {word for text in texts for word in text.lower().split()}
    found = {one for word in words for one in clip.to_ids(word)}
    assert clip.start is not None
    return (*sorted(found), clip.start, clip.end)
