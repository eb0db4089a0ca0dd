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
        self._stop = [_StopString(string) for string in stop]
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
        for character in characters:
            self._text += character
            completed = [len(stop) for stop in self._stop if stop.push(character)]
            if completed:
                self.stopped = last = True
                self._text = self._text[: -max(completed)]
                break
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

    def _ready_length(self) -> int:
        """How much can no longer be cut: all but a possible beginning of a stop string and trailing white space."""
        held = max((stop.matched for stop in self._stop), default=0)
        return len(self._text[: len(self._text) - held].rstrip())


class _StopString:
    """Follows a text character by character at constant cost, however long the stop string (Knuth, Morris, Pratt)."""

    def __init__(self, string: str) -> None:
        self._string = string
        self._borders = [0]  # of each beginning: the longest shorter one that it ends with; filled as far as needed
        self.matched = 0  # how long a beginning of the stop string the text ends with

    def __len__(self) -> int:
        return len(self._string)

    def push(self, character: str) -> bool:
        """Whether the stop string is complete; nothing may be pushed after that."""
        self.matched = self._longer(self.matched, character)
        if self.matched > len(self._borders):
            self._borders.append(self._longer(self._borders[-1], character))
        return self.matched == len(self._string)

    def _longer(self, matched: int, character: str) -> int:
        while matched and self._string[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self._string[matched] == character)
