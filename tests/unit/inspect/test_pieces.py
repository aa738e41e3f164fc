from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tunesmith.inspect.pieces import Pieces, byte_alphabet

TEXT = "What follows?\n\tzwölf 日本 👩‍👧 <|im_end|> \x1b[31m"


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """Metaspace and byte fallback, as Llama 2 has them."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁wor", "ld", "é", "\n"]
    backend = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_the_alphabet_is_that_of_byte_level_bpe() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}


def test_pieces_join_to_the_decoded_text(tokenizer: Any) -> None:
    pieces, ids = Pieces(tokenizer), tokenizer(TEXT)["input_ids"]
    texts = pieces(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == TEXT == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for start in range(len(ids)):  # also where characters are cut in two
        for stop in range(start, min(start + 6, len(ids)) + 1):
            assert "".join(pieces(ids[start:stop])) == pieces.decoded(ids[start:stop])


def test_a_character_stands_whole_on_its_last_token(tokenizer: Any) -> None:
    pieces = Pieces(tokenizer)
    ids = tokenizer("日", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert pieces(ids) == ["", "", "日"]
    assert pieces(ids[:2]) == ["", "\ufffd"]
    assert pieces([]) == []


def test_control_tokens_are_known_by_id(tokenizer: Any) -> None:
    ids = tokenizer("<|im_start|>user", add_special_tokens=False)["input_ids"]
    assert ids[0] in Pieces(tokenizer).special
    assert not set(ids[1:]) & Pieces(tokenizer).special


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        (["<s>", "▁Hello", "▁wor", "ld"], ["<s>", " Hello", " wor", "ld"]),
        (["▁Hello", "▁", "<0xE6>", "<0x97>", "<0xA5>", "\n"], ["Hello", " ", "", "", "日", "\n"]),
        (["▁Hello", "</s>", "▁Hello"], ["Hello", "</s>", " Hello"]),
    ],
)
def test_sentencepiece(sentencepiece: Any, tokens: list[str], texts: list[str]) -> None:
    ids = sentencepiece.convert_tokens_to_ids(tokens)
    pieces = Pieces(sentencepiece)
    assert pieces(ids) == texts
    assert "".join(texts) == pieces.decoded(ids)
    assert pieces._by_prefixes(ids) == texts
    unfinished = [*ids, *sentencepiece.convert_tokens_to_ids(["<0xE6>", "<0x97>"])]
    assert "".join(pieces(unfinished)) == pieces.decoded(unfinished)
