"""Each token's own text, so that the pieces of a sequence join to exactly its decoded text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the others follow at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Pieces:
    """Token ids to texts. A character of several tokens stands whole on the last of them, and "" on those before."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.backend: Any = tokenizer.backend_tokenizer
        self.special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        """Ids of control tokens."""
        self._bytes = byte_alphabet() if "ByteLevel" in str(self.backend.decoder) else {}

    def decoded(self, tokens: Sequence[int]) -> str:
        """What the tokenizer says the tokens are."""
        return self.backend.decode(list(tokens), skip_special_tokens=False)

    def __call__(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token of one sequence."""
        pieces = self._by_bytes(tokens) if self._bytes else self._by_stream(tokens)
        return pieces if "".join(pieces) == self.decoded(tokens) else self._by_prefixes(tokens)

    def _by_bytes(self, tokens: Sequence[int]) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = []
        for n, token in enumerate(tokens, start=1):
            name = self.backend.id_to_token(token) or ""
            known = all(character in self._bytes for character in name)
            data = bytes(self._bytes[character] for character in name) if known else name.encode()
            pieces.append(decoder.decode(data, final=n == len(tokens)))
        return pieces

    def _by_stream(self, tokens: Sequence[int]) -> list[str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        pieces = [stream.step(self.backend, token) or "" for token in tokens]
        if pieces:  # a character that never came to its end
            pieces[-1] += self.decoded(tokens)[sum(map(len, pieces)) :]
        return pieces

    def _by_prefixes(self, tokens: Sequence[int]) -> list[str]:
        """Quadratic, but right for any decoder under which what is said stays said."""
        whole, pieces, said = self.decoded(tokens), [], 0
        for stop in range(1, len(tokens) + 1):
            text = self.decoded(tokens[:stop])
            if stop < len(tokens) and (text.endswith("\ufffd") or not whole.startswith(text) or len(text) < said):
                pieces.append("")
                continue
            text = whole if stop == len(tokens) else text
            pieces.append(text[said:])
            said = len(text)
        return pieces
