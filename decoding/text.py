"""Make text of tokens while they are decoded, and end it before a stop string."""

from collections.abc import Sequence

from loading.tokenizer import Tokenizer


class TextStream:
    """Turn tokens into text one by one, and cuts the text before the first stop string.

    Pass `take` to decode() as `finished`. Stop strings may span tokens, so the end of the text is held back while it
    could be the beginning of one. Without a tokenizer the text is the token ids, with spaces.

    Attributes: text, all of it so far; cut, the length of the text before the stop string, None until there is one.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str] = ()):
        self.stops = [stop for stop in stops if stop]
        self.decoder = tokenizer.decode_stream(continues=True) if tokenizer else None
        self.text = ""
        self.cut: int | None = None

    def take(self, token: int) -> bool:
        """Take the next token; return True if a stop string is complete."""
        before = len(self.text)
        self.text += self.decoder.push([token]) if self.decoder else f"{token} "
        places = (self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stops)
        self.cut = min((place for place in places if place >= 0), default=None)
        return self.cut is not None

    @property
    def safe_end(self) -> int:
        """Return how much of the text cannot be part of a stop string any more."""
        if self.cut is not None:
            return self.cut
        held = max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        return len(self.text) - held

    def close(self) -> str:
        """Take in what the decoder still holds back; return the whole text, without a stop string."""
        if self.decoder and self.cut is None:
            self.text += self.decoder.flush()
        return self.text if self.cut is None else self.text[: self.cut]
