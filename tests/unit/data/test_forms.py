"""Samples for objectives other than sft: their tokens, weights and labels; and what is said where the data does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import train_tokenizer
from tests.samples import make_samples
from tests.unit.data.test_prepare import number_tokenizer
from tunesmith.config import DataConfig
from tunesmith.data.choices import choose, divider
from tunesmith.data.encode import Encoder
from tunesmith.data.forms import check_labels
from tunesmith.data.pack import collate
from tunesmith.data.prepare import load_samples
from tunesmith.data.render import Renderer
from tunesmith.data.samples import Counts, Samples
from tunesmith.data.sources import raise_error
from tunesmith.errors import DataError, UserError
from tunesmith.objectives.base import Form
from tunesmith.types import Example, Message, Piece, Place

NUMBERS = number_tokenizer()
PLACE = Place("a.jsonl", 3)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def load(form: Form, *records: dict[str, Any], tokenizer: Any = NUMBERS, **settings: Any) -> Samples:
    Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(**{"path": "a.jsonl", "eval_fraction": 0.0, "truncation": "right", **settings})
    return load_samples(config, Renderer(tokenizer, config, form))[0]


def read(samples: Samples) -> list[tuple[list[int], list[float], float]]:
    """(tokens, weights, label) of each sequence."""
    return [
        (tokens.tolist(), weights.tolist(), samples.label(n))
        for n in range(len(samples))
        for tokens, weights in samples.sequences(n)
    ]


def shown(samples: Samples, tokenizer: Any) -> list[str]:
    """The text of each sequence, with the targets in brackets: [weight token]."""
    found = []
    for tokens, weights, _ in read(samples):
        texts = [tokenizer.decode([token]) for token in tokens]
        pairs = zip(texts, weights, strict=True)
        found.append("".join(f"[{weight:g} {text}]" if weight else text for text, weight in pairs))
    return found


def refusal(form: Form, *records: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(form, *records, **settings)
    return str(caught.value)


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


# ---- pairs


def test_the_label_of_a_pair_is_its_margin() -> None:
    pair = {"prompt": "1 2 ", "chosen": "3", "rejected": "4 5"}
    samples = load("pairs", pair, pair | {"margin": 1.5}, pair | {"chosen_score": 4, "rejected_score": 1})
    weighted = [([1, 2, 3], [0, 0, 1]), ([1, 2, 4, 5], [0, 0, 1, 1])]
    assert read(samples) == [(*side, margin) for margin in (0.0, 1.5, 3.0) for side in weighted]
    batch = collate(samples, [2, 0], 8, pack=True)
    assert batch.sequence_columns["label"].tolist() == samples.labels()[batch.sample_N].tolist()
    assert batch.sequence_columns["label"].dtype == torch.float32


def test_a_pair_of_equal_answers() -> None:
    said = "chosen and rejected are equal: neither is better: give two different answers, or remove the record"
    pair = {"prompt": "1 ", "chosen": "3", "rejected": "3"}
    for form in ("pairs", "feedback"):
        assert refusal(form, pair) == f"a.jsonl:1:1: {said}"  # type: ignore[arg-type]
    assert len(load("answers", pair)) == 1


def test_a_pair_that_only_the_template_makes_equal() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    pair = {"prompt": chat("a"), "chosen": chat("", "b")[1:], "rejected": chat("", " b")[1:]}
    assert "chosen and rejected are equal" in refusal("pairs", pair, tokenizer=tokenizer)


def test_a_pair_whose_words_make_the_same_tokens() -> None:
    pair = {"prompt": "1 ", "chosen": "50001", "rejected": "50002"}  # both are the unknown token
    assert refusal("pairs", {**pair, "rejected": "3"}, pair).startswith("a.jsonl:2:1: chosen and rejected are equal")


def test_a_pair_that_differs_beyond_the_cut_is_dropped() -> None:
    records = [
        {"prompt": "1 2 ", "chosen": "3 4 5", "rejected": "3 4 6"},
        {"prompt": "1 ", "chosen": "2", "rejected": "3"},
    ]
    samples = load("pairs", *records, max_tokens=4)
    assert [tokens for tokens, _, _ in read(samples)] == [[1, 2], [1, 3]]
    assert samples.counts == Counts(2, truncated=0, dropped=1, first_cut="a.jsonl:1")
    kept = load("pairs", *records, max_tokens=4, truncation="left")
    assert [tokens for tokens, _, _ in read(kept)] == [[2, 3, 4, 5], [2, 3, 4, 6], [1, 2], [1, 3]]
    assert kept.counts == Counts(2, truncated=1, dropped=0, first_cut="a.jsonl:1")


# ---- feedback


@pytest.mark.parametrize("learn", ["assistant", "all", "each"])
def test_of_feedback_only_the_last_answer_is_learnt(learn: str, tokenizer: Any) -> None:
    turns = chat("a", "b", "c", "d")
    turns[1]["weight"] = 1  # type: ignore[assignment]
    records = [{"messages": turns, "label": True}, {"messages": chat("a", "b"), "label": False}]
    samples = load("feedback", *records, tokenizer=tokenizer, learn=learn)
    assert shown(samples, tokenizer) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n[1 d][1 <|im_end|>]\n",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[1 b][1 <|im_end|>]\n",
    ]
    assert samples.labels().tolist() == [1.0, 0.0]


def test_feedback_on_plain_text() -> None:
    records = [{"prompt": "1 2 ", "completion": str(n), "label": n == 3} for n in (3, 4)]
    assert read(load("feedback", *records, learn="all")) == [([1, 2, 3], [0, 0, 1], 1.0), ([1, 2, 4], [0, 0, 1], 0.0)]


def test_a_pair_is_two_pieces_of_feedback() -> None:
    samples = load("feedback", {"prompt": "1 2 ", "chosen": "3", "rejected": "4"})
    assert read(samples) == [([1, 2, 3], [0, 0, 1], 1.0), ([1, 2, 4], [0, 0, 1], 0.0)]
    assert samples.group_size == 1


@pytest.mark.parametrize(
    ("label", "found", "other"), [(True, "desirable", "undesirable"), (False, "undesirable", "desirable")]
)
def test_feedback_of_one_kind(label: bool, found: str, other: str) -> None:
    config = DataConfig(path="a.jsonl")
    samples = load("feedback", *({"prompt": "1 ", "completion": "2", "label": label} for _ in range(3)))
    with pytest.raises(UserError) as caught:
        check_labels(samples, "feedback", config)
    assert str(caught.value) == (
        f"a.jsonl: all 3 answers to train on are marked as {found}: add some that are {other}, or use another objective"
    )
    check_labels(load("pairs", {"prompt": "1 ", "chosen": "2", "rejected": "3"}), "pairs", config)
    check_labels(load("feedback", {"prompt": "1 ", "chosen": "2", "rejected": "3"}), "feedback", config)


# ---- choices

FILMS = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
WORDS = {"labels": ["no", "yes", "maybe"]}


def test_a_question_ends_where_its_answers_part(tokenizer: Any) -> None:
    samples = load("choices", *FILMS, tokenizer=tokenizer, **WORDS)
    start = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert shown(samples, tokenizer) == [start.format("good") + "[1 y]", start.format("bad") + "[1 n]"]
    assert samples.labels().tolist() == [1.0, 0.0]
    for n in range(2):
        assert samples.choices(n).dtype == np.int32
        assert tokenizer.convert_ids_to_tokens(samples.choices(n).tolist()) == ["n", "y", "m"]
    batch = collate(samples, [0, 1], 64, pack=True)
    at = batch.weights_BT[0].nonzero().flatten().tolist()
    assert batch.token_columns["choices"][0, at].tolist() == [samples.choices(0).tolist()] * 2
    assert samples.counts.conversations == 2  # a record is counted once, not once for each class


def test_what_the_answers_have_in_common_stands_before_the_target() -> None:
    record = {"query": "1 2", "choices": ["7 8 9", "7 5"], "gold": 0}
    samples = load("choices", record, {"query": "3", "choices": ["4", "5", "6"], "gold": 2}, as_chat=False)
    assert read(samples) == [([1, 2, 7, 8], [0, 0, 0, 1], 0.0), ([3, 6], [0, 1], 2.0)]
    assert [samples.choices(n).tolist() for n in (0, 1)] == [[8, 5], [4, 5, 6]]
    batch = collate(samples, [0, 1], 8, pack=True)
    assert batch.token_columns["choices"].tolist() == [[[-1] * 3] * 3 + [[8, 5, -1]] + [[-1] * 3] + [[4, 5, 6]]]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (["7 1", "7 2", "8"], "the classes 7 1, 7 2 begin with the same token: "),
        (["7", "7 2"], "the class 7 is the beginning of another one: "),
    ],
)
def test_answers_that_begin_alike(choices: list[str], said: str) -> None:
    remedy = "choose words that differ at their beginning, in data.labels or choices"
    record = {"query": "1", "choices": choices, "gold": 0}
    assert refusal("choices", record, as_chat=False) == f"a.jsonl:1:1: {said}{remedy}"
    fine = {"query": "1", "choices": ["2", "3"], "gold": 0}
    samples = load("choices", record, fine, as_chat=False, bad_records="skip")
    assert (read(samples), samples.counts.skipped) == ([([1, 2], [0, 1], 0.0)], 1)
    assert samples.place(0).line == 2


def test_classes_that_are_no_choice(tokenizer: Any) -> None:
    assert refusal("choices", FILMS[0], labels=["no", "no"], tokenizer=tokenizer) == (
        "a.jsonl:1:1: the classes are no, no: two or more different words are needed: give each class a word of its own, in "
        "data.labels or choices"
    )
    assert refusal("choices", {"text": "good", "label": "yes"}) == (
        "a.jsonl:1:1: no classes to choose from: the words of the classes are not known: set data.labels to all of them, in "
        "the order of the labels, such as [negative, positive]"
    )


def test_nothing_before_the_answer() -> None:
    example = Example(PLACE, pieces=(Piece("", False), Piece("4", True)), choices=("4", "5"))
    renderer = Renderer(NUMBERS, DataConfig(path="x"), "choices")
    rendered = [(example, sample) for sample in renderer.render(example)]
    encoded = Encoder(NUMBERS).encode([marked for _, sample in rendered for marked in sample])
    with pytest.raises(DataError, match="nothing stands before its answer: give the text to classify"):
        choose(rendered, encoded, raise_error)


def test_a_question_that_is_too_long_loses_its_beginning() -> None:
    record = {"query": "1 2 3 4 5", "choices": ["7", "8"], "gold": 1}
    settings = {"as_chat": False, "max_tokens": 4}
    for truncation in ("right", "left", "split"):
        samples = load("choices", record, truncation=truncation, **settings)
        assert read(samples) == [([3, 4, 5, 8], [0, 0, 0, 1], 1.0)]
        assert samples.choices(0).tolist() == [7, 8]
        assert (samples.counts.truncated, samples.counts.notes) == (1, {})
    short = {"query": "1", "choices": ["3", "4"], "gold": 0}
    samples = load("choices", record, short, truncation="drop", **settings)
    assert (read(samples), samples.choices(0).tolist()) == ([([1, 3], [0, 1], 0.0)], [3, 4])
    assert refusal("choices", record, truncation="error", **settings) == (
        "a.jsonl:1:1: the prompt has 5 tokens, data.max_tokens is 4: nothing of the answer is left: raise it, or set "
        "data.truncation to left or drop"
    )


def test_records_of_one_class(tokenizer: Any) -> None:
    samples = load("choices", FILMS[0], FILMS[0] | {"text": "fine"}, tokenizer=tokenizer, **WORDS)
    with pytest.raises(UserError) as caught:
        check_labels(samples, "choices", DataConfig(path="a.jsonl", labels=("no", "yes", "maybe")))
    assert str(caught.value) == (
        "a.jsonl: all 2 records to train on have the class yes: add records of the others (data that is sorted by class? then "
        "raise data.max_samples)"
    )
    check_labels(load("choices", *FILMS, tokenizer=tokenizer, **WORDS), "choices", DataConfig(path="a.jsonl"))
    records = [
        {"query": "1", "choices": [word, "9"], "gold": 0} for word in ("3", "4")
    ]  # multiple choice, the first is right
    check_labels(load("choices", *records, as_chat=False), "choices", DataConfig(path="a.jsonl"))


def metaspace(scheme: Any) -> Any:
    """A tokenizer that marks the beginning of words, as SentencePiece does."""
    words = {
        word: n
        for n, word in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", "▁", "▁good", "good", *"▁ouserainyg\n"])
    }
    backend = Tokenizer(models.WordLevel({**words, "<0>": len(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )


@pytest.mark.parametrize("scheme", ["byte level", "first", "always", "never"])
def test_a_question_cut_before_a_special_token_has_the_tokens_of_the_whole(scheme: str, tokenizer: Any) -> None:
    own = tokenizer
    if scheme != "byte level":
        own = metaspace(scheme)
        own.chat_template = tokenizer.chat_template
    renderer = Renderer(own, DataConfig(path="x"), "choices")
    example = Example(
        PLACE, messages=(Message("user", "a good so"), Message("assistant", "yes")), choices=("no", "yes")
    )
    [whole] = renderer.render(example)
    divided = divider(own)(whole)
    assert [marked.text[:12] for marked in divided] == ["<|im_start|>"] * 3
    results = []
    for sample in (whole, divided):
        chosen, encoded, words = choose([(example, sample)], Encoder(own, fast=False).encode(list(sample)), raise_error)
        results.append((encoded.tokens.tolist(), encoded.weights.tolist(), words[0].tolist(), len(chosen[0][1])))
    assert results[0] == results[1]


# ---- steps


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_step_has_its_weight_at_its_last_token(as_chat: bool, tokenizer: Any) -> None:
    steps = {"prompt": "q\n", "completions": ["ä one.", "two ", "<|im_end|> é"], "labels": [True, False, True]}
    samples = load("steps", steps, tokenizer=tokenizer, as_chat=as_chat, learn="all")
    [text] = shown(samples, tokenizer)
    start, end = (
        ("<|im_start|>user\nq\n<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
        if as_chat
        else ("q\n", "<|im_end|>")
    )
    # a character of two bytes is two tokens here, each of which decodes to the replacement character
    assert text == start + "\ufffd\ufffd one[1 .]\n\ntw[-1 o] \n\n<|im_end|> \ufffd[1 \ufffd]" + end
    assert samples.labels().tolist() == [0.0]


def test_the_token_that_holds_a_steps_last_character_may_end_behind_it() -> None:
    backend = Tokenizer(
        models.BPE({"a": 0, "b": 1, ".": 2, "\n": 3, "\n\n": 4, ".\n\n": 5}, [("\n", "\n"), (".", "\n\n")])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    record = {"prompt": "b", "completions": ["a.", "a.", "a"], "labels": [True, False, False]}
    assert read(load("steps", record, tokenizer=tokenizer)) == [([1, 0, 5, 0, 5, 0], [0, 0, 1, 0, -1, -1], 0.0)]


def test_solutions_with_wrong_steps_are_told_when_sft_learns_them() -> None:
    record = {"prompt": "1 ", "completions": ["2 ", "3"], "labels": [True, False]}
    samples = load("answers", record)
    assert read(samples) == [([1, 2, 3], [0, 1, 1], 0.0)]
    assert samples.counts.notes == {"solutions with steps marked as wrong, learnt whole": 1}


@pytest.mark.parametrize(("label", "found", "other"), [(True, "right", "wrong"), (False, "wrong", "right")])
def test_steps_of_one_kind(label: bool, found: str, other: str) -> None:
    def check(*labels: bool) -> None:
        record = {"prompt": "1 ", "completions": ["2 ", "3"], "labels": labels}
        check_labels(load("steps", record), "steps", DataConfig(path="a.jsonl"))

    with pytest.raises(UserError) as caught:
        check(label, label)
    assert str(caught.value) == (
        f"a.jsonl: all steps to train on are marked as {found}: add some that are {other}, or use sft"
    )
    check(label, not label)


def test_a_template_that_rewrites_the_answer() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].replace('b', 'B')"
    )
    example = Example(
        PLACE, messages=(Message("user", "a"), Message("assistant", "b\n\nc")), steps=(("b", True), ("c", True))
    )
    with pytest.raises(DataError) as caught:
        Renderer(tokenizer, DataConfig(path="x"), "steps").render(example)
    assert caught.value.what == "its steps do not stand in its last answer as the chat template writes it"


# ---- data that does not fit

ALPACA = {"instruction": "1", "input": "2", "output": "3"}


NO_PAIR = "no preference pair: looked for chosen and rejected (with prompt, instruction or conversations)"
NO_CLASSES = "no classes to choose from: looked for label (with text), or query, choices and gold"
NO_STEPS = "no steps marked as right or wrong: looked for completions and labels (with prompt)"
NO_MARK = (
    "no answer marked as desirable or not: looked for label or kto_tag (with prompt and completion, or messages), or chosen "
    "and rejected"
)
PAIR = {"prompt": "1 ", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
    ("form", "record", "said", "objective"),
    [
        ("pairs", ALPACA, f"{NO_PAIR}, found instruction, input, output", "sft"),
        ("pairs", {"prompt": "1 ", "completion": "2", "label": True}, f"{NO_PAIR}, found prompt, completion, label", "kto"),
        ("feedback", {"messages": chat("1", "2")}, f"{NO_MARK}, found messages", "sft"),
        ("choices", PAIR, f"{NO_CLASSES}, found prompt, chosen, rejected", "dpo"),
        ("steps", {"query": "1", "choices": ["2", "3"], "gold": 0}, f"{NO_STEPS}, found query, choices, gold", "classify"),
        (
            "choices", {"prompt": "1 ", "completions": ["2"], "labels": [True]},
            f"{NO_CLASSES}, found prompt, completions, labels", "prm",
        ),
    ],
)  # fmt: skip
def test_data_of_another_form(form: Form, record: dict[str, Any], said: str, objective: str) -> None:
    remedy = f"name the columns in data.columns, or use objective: {objective}"
    assert refusal(form, record) == f"a.jsonl:1:1: {said}: {remedy}"


def test_the_keys_that_are_named_are_those_of_the_file() -> None:
    record = {"question": "1", "reply": "2"}
    settings = {"columns": {"instruction": "question", "output": "reply"}}
    assert "found question, reply: " in refusal("pairs", record, **settings)


# ---- kept on disk


def test_labels_and_choices_come_back_from_the_cache_and_are_in_the_fingerprint() -> None:
    record = {"query": "1", "choices": ["4", "5"], "gold": 0}
    first, again = (load("choices", record, as_chat=False) for _ in range(2))
    other = load("choices", record | {"choices": ["4", "6"]}, as_chat=False)
    assert read(first) == read(again) == read(other)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    marks = [load("feedback", {"prompt": "1 ", "completion": "2", "label": label}) for label in (True, False)]
    assert marks[0].fingerprint() != marks[1].fingerprint()
    assert load("answers", {"prompt": "1 ", "completion": "2"}).choices(0).tolist() == []


def test_samples_by_hand() -> None:
    samples = make_samples([[1, 2], [3, 4]], labels=[1.0, 2.0], choices=[[5, 6], [7]])
    assert [(samples.label(n), samples.choices(n).tolist()) for n in (0, 1)] == [(1.0, [5, 6]), (2.0, [7])]
    assert samples.labels().tolist() == [1.0, 2.0]
