"""A tokenizer of words, which keeps spaces as byte-level ones do."""

import dataclasses
import re


@dataclasses.dataclass
class Words:
    """Ids from 10 in the order in which words come; a word has the space before it."""

    eos: int = 2
    bos: int | None = 1
    known: dict[str, int] = dataclasses.field(default_factory=dict)

    def encode(self, text, bos=None):
        words = re.findall(r" ?[^\s]+|\s+(?!\S)|\s+", text)
        ids = [self.known.setdefault(word, 10 + len(self.known)) for word in words]
        return [self.bos] * (self.bos is not None and bos is not False) + ids

    def decode(self, ids):
        words = {number: word for word, number in self.known.items()}
        return "".join(words.get(int(number), "") for number in ids)
