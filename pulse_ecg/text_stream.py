"""From token ids to text as it may be shown: whole characters only, stop strings cut, outer white space dropped.

What :class:`TextStream` hands out, joined, is the answer: streaming and waiting give the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

from pulse_ecg.tokenizer import Tokenizer


class TextStream:
    """Incremental detokeniser.

    Stop strings are matched on characters, so it does not matter how tokens cut them.  The first to be completed ends
    the text; where several end on the same character, the one that begins first.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest_stop = max((len(s) for s in self._stop), default=0)
        self._held_bytes: list[int] = []  # ids of byte tokens that are no whole character yet
        self._text = ""  # decoded so far and not shown yet
        self._shown_any = False
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` lets through; empty while it may still become part of a stop string."""
        if self.stopped:
            return ""
        return self._advance(self._characters(token_id), last=False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        if self.stopped:
            return ""
        return self._advance(self._flush_bytes(), last=True)

    def _advance(self, characters: str, *, last: bool) -> str:
        searched = max(0, len(self._text) - self._longest_stop + 1)
        self._text += characters
        cut = self._first_stop(searched)
        if cut is not None:
            self.stopped = True
            self._text, last = self._text[:cut], True
        ready = len(self._text.rstrip()) if last else self._ready_length()
        shown, self._text = self._text[:ready], self._text[ready:]
        if not self._shown_any:
            shown = shown.lstrip()
        self._shown_any = self._shown_any or bool(shown)
        return shown

    def _characters(self, token_id: int) -> str:
        """Text of a token once its characters are whole; invalid bytes become U+FFFD as sentencepiece has it."""
        if self._tokenizer.is_special(token_id):
            return ""
        if self._tokenizer.byte_value(token_id) is None:
            return self._flush_bytes() + self._tokenizer.decode([token_id])
        self._held_bytes.append(token_id)
        text = ""
        while length := self._whole_bytes():
            text += self._tokenizer.decode(self._held_bytes[:length])
            del self._held_bytes[:length]
        return text

    def _whole_bytes(self) -> int:
        """How many of the held bytes are decided: whole characters, or one byte that can never become part of one."""
        held = bytes(self._tokenizer.byte_value(i) or 0 for i in self._held_bytes)
        try:
            held.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start > 0:
                return error.start
            return 0 if error.reason == "unexpected end of data" else 1
        return len(held)

    def _flush_bytes(self) -> str:
        ids, self._held_bytes = self._held_bytes, []
        return self._tokenizer.decode(ids) if ids else ""

    def _first_stop(self, start: int) -> int | None:
        """Where the text is to be cut, or None."""
        found = [(at + len(stop), at) for stop in self._stop if (at := self._text.find(stop, start)) >= 0]
        return min(found)[1] if found else None

    def _ready_length(self) -> int:
        """How much can no longer be cut: all but a possible beginning of a stop string and trailing white space."""
        ready = len(self._text)
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text)), 0, -1):
                if self._text.endswith(stop[:length]):
                    ready = min(ready, len(self._text) - length)
                    break
        return len(self._text[:ready].rstrip())
