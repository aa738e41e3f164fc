"""Alignment of tokenizers whose merges are few enough to see by hand where tokens begin."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tunesmith.alignment import Alignment


def make_tokenizer(*merges: str, bos: str | None = None, special: tuple[str, ...] = ()) -> Any:
    """Byte-level BPE with the given merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split("+")) for merge in merges]
    vocabulary = {token: n for n, token in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*special, *([bos] if bos else []))])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


def test_alignment_by_hand() -> None:
    ours = make_tokenizer("a+b", "ab+c")
    theirs = make_tokenizer("b+c")
    tokens = ours("abcab")["input_ids"]
    assert ours.convert_ids_to_tokens(tokens) == ["abc", "ab"]
    their_tokens, begins = Alignment(ours, theirs)(tokens)
    assert theirs.convert_ids_to_tokens(their_tokens) == ["a", "bc", "a", "b"]
    assert begins == [0, 2]  # abc|ab and a|bc|a|b
    assert Alignment(theirs, ours)(their_tokens) == (tokens, [0, -1, 1, -1])


def test_alignment_with_a_token_before_the_text() -> None:
    ours, theirs = make_tokenizer("a+b"), make_tokenizer(bos="<s>")
    their_tokens, begins = Alignment(ours, theirs)(ours("abab")["input_ids"])
    assert theirs.convert_ids_to_tokens(their_tokens) == ["<s>", "a", "b", "a", "b"]
    assert begins == [1, 3]
    spelt = make_tokenizer("a+b", bos="<s>")
    their_tokens, begins = Alignment(spelt, theirs)(spelt("abab")["input_ids"])
    assert theirs.convert_ids_to_tokens(their_tokens) == ["<s>", "a", "b", "a", "b"]  # not twice
    assert begins == [0, 1, 3]


def test_alignment_inside_a_character() -> None:
    """é and € are two and three bytes; a token that begins within one has no counterpart."""
    single, merged = make_tokenizer(), make_tokenizer("Ã+©", "â+Ĥ")
    tokens = single("é€x")["input_ids"]
    assert len(tokens) == 6
    assert Alignment(single, merged)(tokens)[1] == [0, -1, 1, -1, -1, 3]
    assert Alignment(merged, single)(merged("é€x")["input_ids"])[1] == [0, 2, -1, 5]


def test_alignment_of_special_tokens_and_spaces() -> None:
    ours = make_tokenizer("Ġ+b", special=("<end>",))
    theirs = make_tokenizer("a+Ġ")
    tokens = ours("a b<end>a")["input_ids"]
    assert ours.convert_ids_to_tokens(tokens) == ["a", "Ġb", "<end>", "a"]
    _, begins = Alignment(ours, theirs)(tokens)
    assert begins == [0, 1, 3, 8]  # theirs: a, Ġ, b, <, e, n, d, >, a: the merge does not cross words


def test_alignment_of_tokens_that_nobody_would_write_so() -> None:
    """a and b apart though the tokenizer would merge them, as when a prompt and an answer are joined."""
    ours, theirs = make_tokenizer("a+b"), make_tokenizer("b+a")
    apart = ours.convert_tokens_to_ids(["a", "b", "a", "Ã", "©", "b"])
    their_tokens, begins = Alignment(ours, theirs)(apart)
    assert theirs.convert_ids_to_tokens(their_tokens) == ["a", "ba", "Ã", "©", "b"]
    assert begins == [0, 1, -1, 2, -1, 4]
