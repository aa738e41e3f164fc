import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import fastokens
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from tests.families import train_tokenizer
from tunesmith.data import encode
from tunesmith.data.encode import Encoded, Encoder, FastDisagrees
from tunesmith.data.render import Marked
from tunesmith.errors import UserError

END = "<|im_end|>"
PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


def parts(encoded: Encoded) -> list[tuple[list[int], list[float]]]:
    borders = encoded.offsets.tolist()
    return [
        (encoded.tokens[start:stop].tolist(), encoded.weights[start:stop].tolist()) for start, stop in pairwise(borders)
    ]


def one(encoder: Encoder, marked: Marked) -> tuple[list[int], list[float]]:
    [part] = parts(encoder.encode([marked]))
    return part


def learnt(tokenizer: Any, part: tuple[list[int], list[float]]) -> str:
    return tokenizer.decode([token for token, weight in zip(*part, strict=True) if weight])


def metaspace(prepend: str) -> PreTrainedTokenizerFast:
    """A tokenizer that writes spaces into its tokens, as Llama 2's and Mistral's."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)])
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator(["to be or not to be, that is the question"] * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("fast", [True, False])
def test_a_token_is_in_a_span_if_it_begins_and_ends_there(fast: bool, tokenizer: Any) -> None:
    text = "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nAfter 3 é comes<|im_end|>\n"
    start, stop = text.index("After"), len(text) - 1
    encoder = Encoder(tokenizer, fast)
    assert encoder.is_fast == fast
    part = one(encoder, Marked(text, spans=((start, stop, 0.5),)))
    assert part[0] == tokenizer(text, add_special_tokens=False).input_ids
    assert learnt(tokenizer, part) == "After 3 é comes<|im_end|>"
    assert set(part[1]) == {0.0, 0.5}


@PROPERTY
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS, st.booleans()), min_size=1, max_size=6))
def test_both_ways_give_the_same(tokenizer: Any, texts: list[tuple[str, str, str, bool]]) -> None:
    batch = [
        Marked(
            f"{before}{END}{inside}{END}{behind}",
            base=0.25,
            spans=((len(before) + len(END), len(before) + 2 * len(END) + len(inside), 1.0),),
            plain=plain,
        )
        for before, inside, behind, plain in texts
    ]
    fast, slow = (parts(Encoder(tokenizer, fast).encode(batch)) for fast in (True, False))
    assert fast == slow


@PROPERTY
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_a_normalizer_that_changes_the_text_is_seen(texts: list[str]) -> None:
    """NFC makes one character of two, so that tokens and text have different bytes: offsets decide then."""
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.NFC()
    batch = [Marked(f"cafe\u0301{text}", spans=((0, 5, 1.0),)) for text in texts]
    fast, slow = (parts(Encoder(tokenizer, fast).encode(batch)) for fast in (True, False))
    assert fast == slow


def without_merges(tokenizer: Any) -> Any:
    """fastokens with the same vocabulary that gives other tokens: single bytes."""
    source = json.loads(tokenizer.backend_tokenizer.to_str())
    source["model"]["merges"] = []
    return fastokens.Tokenizer.from_json_str(json.dumps(source))


def test_disagreement_is_noticed(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    encoder._fast = without_merges(tokenizer)
    with pytest.raises(FastDisagrees):
        encoder.encode([Marked("+"), Marked("comes")])


def test_one_text_of_every_later_batch_is_compared(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    encoder.encode([Marked("comes")])
    encoder._fast = without_merges(tokenizer)
    with pytest.raises(FastDisagrees):
        encoder.encode([Marked("comes")])


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_tokenizers_with_spaces_in_their_tokens(prepend: str) -> None:
    tokenizer = metaspace(prepend)
    encoder = Encoder(tokenizer)
    assert not encoder.is_fast
    text = "to be</s>that is the question</s> or not"
    part = one(encoder, Marked(text, spans=((text.index("that"), text.index(" or"), 1.0),)))
    assert part[0] == tokenizer(text, add_special_tokens=False).input_ids
    assert learnt(tokenizer, part) == "that is the question</s>"


TOKENIZERS = {
    "byte-level": train_tokenizer,
    **{f"metaspace {kind}": lambda kind=kind: metaspace(kind) for kind in ("always", "first", "never")},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_without_literals_the_slow_way_gives_the_same(name: str) -> None:
    """Text cut at special tokens is encoded piece by piece; a tokenizer that prepends a space must not do so in each."""
    tokenizer = TOKENIZERS[name]()
    encoder, eos = Encoder(tokenizer), tokenizer.eos_token
    for text in ("to be", f"to be{eos} or not{eos}", f"{eos}to  be\n{eos}{eos} é", f" {eos} x", ""):
        marked = Marked(text, spans=((0, min(7, len(text)), 1.0),), plain=True)
        ids, weights = encoder._with_literals(marked)
        weights[:1] = 0
        assert (ids.tolist(), weights.tolist()) == one(encoder, marked)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_in_the_datas_own_text_stay_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    eos = tokenizer.eos_token
    text = f"say {eos} now{eos} ok"
    literal = (text.index(eos), text.index(eos) + len(eos))
    ids, _ = one(Encoder(tokenizer), Marked(text, spans=((0, len(text), 1.0),), literals=(literal,)))
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids).strip() == text


def test_white_space_around_special_tokens_that_swallow_it() -> None:
    for strip in ({"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}):
        tokenizer = train_tokenizer()
        tokenizer.add_tokens([AddedToken("<|x|>", special=True, **strip)])
        encoder = Encoder(tokenizer)
        text = f"a  <|x|> \n b {END} c"
        ids, _ = encoder._with_literals(Marked(text))
        assert ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
        fast, slow = (one(Encoder(tokenizer, fast), Marked(text, 1.0)) for fast in (True, False))
        assert fast == slow


def test_plain_text_gets_the_tokenizers_beginning_and_a_learnt_end() -> None:
    tokenizer = metaspace("first")
    for literals in ((), ((0, 0),)):
        ids, weights = one(Encoder(tokenizer), Marked("to be", spans=((3, 5, 1.0),), plain=True, literals=literals))
        assert ids == [1, *tokenizer("to be", add_special_tokens=False).input_ids, 2]
        assert weights[0] == 0.0
        assert weights[-1] == 1.0


def test_an_end_that_the_text_has_already_is_not_doubled(tokenizer: Any) -> None:
    for fast in (True, False):
        part = one(Encoder(tokenizer, fast), Marked(f"a b{END}", spans=((2, 3, 1.0),), plain=True))
        assert tokenizer.decode(part[0]) == f"a b{END}"
        assert learnt(tokenizer, part) == f"b{END}"


def test_an_end_that_the_tokenizer_adds_is_learnt_once(tokenizer: Any) -> None:
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|im_start|> $A {END}", special_tokens=[(END, tokenizer.eos_token_id), ("<|im_start|>", 1)]
    )
    part = one(Encoder(tokenizer), Marked("a b", spans=((2, 3, 1.0),), plain=True))
    assert tokenizer.decode(part[0]) == f"<|im_start|>a b{END}"
    assert learnt(tokenizer, part) == f"b{END}"


def test_a_tokenizer_without_an_end_adds_none() -> None:
    tokenizer = train_tokenizer()
    tokenizer.eos_token = None
    part = one(Encoder(tokenizer), Marked("ab", 1.0, plain=True))
    assert tokenizer.decode(part[0]) == "ab"


def test_the_first_token_has_no_weight_and_an_empty_text_no_tokens(tokenizer: Any) -> None:
    encoded = Encoder(tokenizer).encode([Marked("", 1.0), Marked("a b c", 1.0), Marked("", 1.0)])
    assert encoded.offsets.tolist() == [0, 0, len(encoded.tokens), len(encoded.tokens)]
    assert encoded.weights.tolist() == [0.0] + [1.0] * (len(encoded.tokens) - 1)
    assert (encoded.tokens.dtype, encoded.weights.dtype, encoded.offsets.dtype) == (np.int32, np.float32, np.int64)
    assert Encoder(tokenizer).encode([]).offsets.tolist() == [0]


def test_white_space_is_learnt_where_the_tokenizer_trims_it_from_offsets() -> None:
    """As GPT-NeoX's does: a token of nothing but spaces then has an empty span."""
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for fast in (True, False):
        part = one(Encoder(tokenizer, fast), Marked("a  b  c", spans=((1, 7, 1.0),)))
        assert learnt(tokenizer, part) == "  b  c"


def test_without_fastokens_tokenizers_does_the_work(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "find_spec", lambda name: None)
    encoder = Encoder(tokenizer)
    assert not encoder.is_fast
    assert one(encoder, Marked("a b"))[0] == tokenizer("a b").input_ids


def test_a_tokenizer_that_truncates_is_stopped_from_it(tokenizer: Any) -> None:
    short = train_tokenizer()
    short._tokenizer.enable_truncation(2)
    short._tokenizer.enable_padding(length=50)
    assert one(Encoder(short), Marked("a b c d e"))[0] == tokenizer("a b c d e").input_ids


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = train_tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    monkeypatch.setattr(slow, "name_or_path", "org/model")
    with pytest.raises(UserError, match=r"^org/model: needs a fast tokenizer \(tokenizer.json\) to place the loss$"):
        Encoder(slow)


def test_replacing_parts_keeps_the_others(tokenizer: Any) -> None:
    batch = [Marked("a b", 1.0), Marked("c", 1.0, plain=True), Marked("d e f", 0.5)]
    alone = [one(Encoder(tokenizer), marked) for marked in batch]
    assert parts(Encoder(tokenizer).encode(batch)) == alone
    assert parts(Encoder(tokenizer).encode([replace(m, plain=False) for m in batch]))[1] != alone[1]


def test_a_beginning_that_the_text_has_already_is_not_doubled() -> None:
    tokenizer = metaspace("first")
    assert one(Encoder(tokenizer), Marked("<s>to be", 1.0, plain=True))[0].count(1) == 1


def test_a_normalizer_whose_changes_cancel_in_bytes_is_seen() -> None:
    """Two ohm signs lose a byte each, a combined accent gains two: the sum is that of the text."""
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.NFC()
    text = "\u2126\u2126 q \u0344 Hello"
    start = text.index("Hello")
    fast, slow = (
        one(Encoder(tokenizer, fast), Marked(text, spans=((start, len(text), 1.0),))) for fast in (True, False)
    )
    assert fast == slow
    assert learnt(tokenizer, fast) == "Hello"
