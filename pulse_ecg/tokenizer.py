"""Text to token ids and back, exactly as the official slow Llama tokenizer does it.

The official code tokenises with transformers' sentencepiece-backed ``LlamaTokenizer``.  In transformers 5
that class gives other ids for some texts (leading or double spaces), so this one stands on sentencepiece
itself, the library underneath, and gives the same ids whatever transformers is installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from pulse_ecg.errors import CheckpointError

_SPACE = "▁"  # sentencepiece writes a space as U+2581
# Concatenated protobuf messages merge (protobuf encoding guide, "Last One Wins"): these four bytes are
# ModelProto{normalizer_spec{add_dummy_prefix: false}}, what the official tokenizer sets when not `legacy`.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# ModelProto{normalizer_spec{add_dummy_prefix: false, remove_extra_whitespaces: false}}: sentencepiece drops the space
# that opens a text where either is set.
_KEEP_SPACES = b"\x1a\x04\x18\x00\x20\x00"
# An unknown-token text before a leading space keeps sentencepiece from swallowing that space.
_GUARD = "<unk>"


class Tokenizer:
    """Sentencepiece model of a checkpoint with the official handling of prefixes and special tokens.

    Text never yields a special token: ``</s>`` typed by a caller is encoded as the characters it consists of.
    """

    def __init__(self, model: bytes, *, legacy: bool, special_ids: frozenset[int] = frozenset()) -> None:
        """``legacy`` is the setting of that name in ``tokenizer_config.json``; ``special_ids`` are left out of text."""
        self._legacy = legacy
        # Decoding never drops the space that opens a text: tokens decoded one by one must join to the whole.
        self._pieces = _processor(model + _KEEP_SPACES)
        self._encoder = _processor(model if legacy else model + _NO_DUMMY_PREFIX)
        self._guard_length = len(self._encoder.encode(_GUARD))
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.size: int = self._pieces.get_piece_size()
        controls = {i for i in range(self.size) if self._pieces.is_control(i) or self._pieces.is_unknown(i)}
        self._special = frozenset(controls) | special_ids
        self.highest_id = max({self.size - 1, *self._special})  # special tokens may be added past the pieces
        self.longest_piece = max(len(self._pieces.id_to_piece(i)) for i in range(self.size))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.model`` and ``tokenizer_config.json``.

        Raises:
            CheckpointError: a file is missing or unreadable, or a setting would change tokens in a way not built here.
        """
        file = folder / "tokenizer.model"
        if not file.is_file():
            raise CheckpointError("The checkpoint holds no tokenizer.model (the sentencepiece model).")
        settings_file = folder / "tokenizer_config.json"
        try:
            settings = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
            added = settings.get("added_tokens_decoder", {})
            special = frozenset(int(i) for i, token in added.items() if token.get("special"))
            for name, only in (("add_bos_token", True), ("add_eos_token", False)):
                if settings.get(name, only) is not only:
                    raise CheckpointError(
                        f"tokenizer_config.json sets {name} to {settings[name]!r}; only {only} is built."
                    )
            # Absent or null means legacy, as in the official code's transformers.
            tokenizer = cls(file.read_bytes(), legacy=settings.get("legacy") is not False, special_ids=special)
            if words := sorted(int(i) for i in added if int(i) >= tokenizer.size and int(i) not in special):
                raise CheckpointError(
                    f"tokenizer_config.json adds the words {words[:5]}; only special tokens may be added."
                )
            return tokenizer
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise CheckpointError("tokenizer.model or tokenizer_config.json cannot be read.") from error

    def encode(self, text: str, *, prefix: bool = True) -> list[int]:
        """Token ids of ``text``, without BOS.

        Args:
            text: any text; nothing in it is taken for a special token.
            prefix: whether the text opens a piece, and so gets sentencepiece's ``▁``; false right after a special
                token.

        Source: ``LlamaTokenizer.tokenize`` and ``_tokenize`` of transformers 4.37.
        """
        if not text:
            return []
        if self._legacy:
            return list(self._encoder.encode(text))
        text = (_SPACE if prefix else "") + text.replace(_SPACE, " ")
        if not text.startswith((_SPACE, " ")):
            return list(self._encoder.encode(text))
        ids = list(self._encoder.encode(_GUARD + text))
        return ids[self._guard_length :] if len(ids) >= self._guard_length else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; nothing is cleaned up or stripped."""
        return str(self._pieces.decode([i for i in ids if not self.is_special(i)]))

    def is_special(self, token_id: int) -> bool:
        """Whether a token stands for no text (BOS, EOS, unknown, padding, or an id past the vocabulary)."""
        return token_id in self._special or not 0 <= token_id < self.size

    def byte_value(self, token_id: int) -> int | None:
        """The byte that a byte-fallback token such as ``<0xC5>`` stands for, or None for any other token."""
        if self.is_special(token_id) or not self._pieces.is_byte(token_id):
            return None
        return int(self._pieces.id_to_piece(token_id)[1:-1], 16)


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor
