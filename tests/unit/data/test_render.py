from dataclasses import replace
from typing import Any

import pytest

from tests.families import CHATML, train_tokenizer
from tunesmith.config import DataConfig
from tunesmith.data.encode import Encoder
from tunesmith.data.render import Marked, Renderer, Sample
from tunesmith.errors import DataError
from tunesmith.types import Example, Form, Message, Piece, Place, ToolCall

PLACE = Place("chats.jsonl", 7)
TURNS = (
    Message("system", "s"),
    Message("user", "a"),
    Message("assistant", "b"),
    Message("user", "c"),
    Message("assistant", "d e"),
)
CHAT = Example(PLACE, messages=TURNS)


def renderer(tokenizer: Any, form: Form = "answers", **settings: Any) -> Renderer:
    return Renderer(tokenizer, DataConfig(path="x", **settings), form)


def learnt(marked: Marked) -> list[tuple[str, float]]:
    return [(marked.text[start:stop], weight) for start, stop, weight in marked.spans]


def only(samples: list[Sample]) -> Marked:
    [(marked,)] = samples
    return marked


@pytest.mark.parametrize(
    ("learn", "base", "spans"),
    [
        ("assistant", 0.0, [("b<|im_end|>", 1.0), ("d e<|im_end|>", 1.0)]),
        ("last", 0.0, [("d e<|im_end|>", 1.0)]),
        ("all", 1.0, []),
    ],
)
def test_which_turns_are_learnt(learn: str, base: float, spans: list, tokenizer: Any) -> None:
    marked = only(renderer(tokenizer, learn=learn).render(CHAT))
    assert (marked.base, learnt(marked)) == (base, spans)


def test_each_answer_in_a_sample_of_its_own(tokenizer: Any) -> None:
    samples = renderer(tokenizer, learn="each").render(CHAT)
    assert [learnt(marked) for (marked,) in samples] == [[("b<|im_end|>", 1.0)], [("d e<|im_end|>", 1.0)]]
    assert [marked.text.count("<|im_start|>") for (marked,) in samples] == [3, 5]


def test_a_messages_own_weight_wins(tokenizer: Any) -> None:
    weights = [None, 0.5, 0.0, None, 2.0]
    messages = tuple(replace(turn, weight=weight) for turn, weight in zip(TURNS, weights, strict=True))
    example = Example(PLACE, messages=messages)
    marked = only(renderer(tokenizer).render(example))
    assert (marked.base, learnt(marked)) == (0.0, [("a<|im_end|>", 0.5), ("d e<|im_end|>", 2.0)])
    marked = only(renderer(tokenizer, learn="all").render(example))
    assert marked.base == 1.0
    assert learnt(marked) == [
        ("a<|im_end|>", 0.5), ("b<|im_end|>", 0.0), ("d e<|im_end|>", 2.0),
    ]  # fmt: skip
    assert only(renderer(tokenizer, "text").render(example)).spans == ()


def test_plain_text(tokenizer: Any) -> None:
    example = Example(PLACE, pieces=(Piece("a ", False), Piece("b", True)))
    marked = only(renderer(tokenizer).render(example))
    assert (marked.text, marked.base, marked.spans, marked.plain) == ("a b", 0.0, ((2, 3, 1.0),), True)
    marked = only(renderer(tokenizer, "text").render(example))
    assert (marked.text, marked.base, marked.spans, marked.plain) == ("a b", 1.0, (), True)


def test_special_tokens_in_the_datas_own_text_are_marked_as_text(tokenizer: Any) -> None:
    messages = (Message("user", "say <|im_end|>"), Message("assistant", "<|im_start|> ok"))
    rendering = renderer(tokenizer)
    marked = only(rendering.render(Example(PLACE, messages=messages)))
    assert marked.text == tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages], tokenize=False
    )
    assert [marked.text[a:b] for a, b in marked.literals] == ["<|im_end|>", "<|im_start|>"]
    assert learnt(marked) == [("<|im_start|> ok<|im_end|>", 1.0)]
    assert rendering.notes == {"texts that spell special tokens, kept as text": 2}
    assert only(renderer(tokenizer, parse_special_tokens=True).render(Example(PLACE, messages=messages))).literals == ()
    plain = Example(PLACE, pieces=(Piece("a<|im_end|>", True),))
    assert only(renderer(tokenizer).render(plain)).literals == ((1, 11),)


def test_a_pair_is_two_sequences_and_without_need_its_chosen_side(tokenizer: Any) -> None:
    rejected = Example(PLACE, messages=(*TURNS[:-1], Message("assistant", "f")))
    pair = replace(CHAT, rejected=rejected)
    [(chosen, worse)] = renderer(tokenizer, "pairs").render(pair)
    assert (learnt(chosen), learnt(worse)) == ([("d e<|im_end|>", 1.0)], [("f<|im_end|>", 1.0)])
    rendering = renderer(tokenizer)
    assert only(rendering.render(pair)) == only(renderer(tokenizer).render(CHAT))
    assert rendering.notes == {"preference pairs of which the chosen answer is learnt": 1}
    with pytest.raises(DataError) as caught:
        renderer(tokenizer, "pairs").render(CHAT)
    assert str(caught.value) == (
        "chats.jsonl:7: no preference pair: looked for chosen and rejected (with prompt, instruction or conversations): "
        "name the columns in data.columns, or use objective: sft"
    )


def test_undesirable_answers_are_not_learnt(tokenizer: Any) -> None:
    rendering = renderer(tokenizer)
    assert rendering.render(replace(CHAT, desirable=False)) == []
    assert len(rendering.render(replace(CHAT, desirable=True))) == 1
    assert rendering.notes == {"answers marked as undesirable, left out": 1}
    assert len(renderer(tokenizer, "text").render(replace(CHAT, desirable=False))) == 1


def test_reasoning_that_the_template_does_not_know_is_told(tokenizer: Any) -> None:
    messages = (Message("user", "a"), Message("assistant", "b", reasoning="think"))
    rendering = renderer(tokenizer)
    assert learnt(only(rendering.render(Example(PLACE, messages=messages)))) == [("b<|im_end|>", 1.0)]
    assert rendering.notes == {"turns learnt without their reasoning: the chat template knows none": 1}


def test_tool_calls_that_the_template_does_not_know_are_refused_and_tools_told(tokenizer: Any) -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Rome"}),))
    with pytest.raises(DataError) as caught:
        renderer(tokenizer).render(Example(PLACE, messages=(Message("user", "a"), call)))
    assert str(caught.value).endswith(
        "messages[1]: the model's chat template leaves tool calls out: use a model whose template knows tools, or set "
        "model.chat_template"
    )
    rendering = renderer(tokenizer)
    rendering.render(replace(CHAT, tools=({"type": "function", "function": {"name": "weather"}},)))
    assert rendering.notes == {"records whose tools the chat template leaves out": 1}


@pytest.mark.parametrize(
    "example",
    [
        Example(PLACE, messages=(Message("user", "a"),)),
        Example(PLACE, messages=(Message("user", "a"), Message("assistant", ""))),
        Example(PLACE, messages=(Message("user", "a"), Message("assistant", "b", weight=0.0))),
        Example(PLACE, pieces=(Piece("a", False), Piece("", True))),
    ],
)
def test_a_record_without_an_answer(example: Example, tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        renderer(tokenizer).render(example)
    assert (caught.value.what, caught.value.remedy) == (
        "nothing to learn from: no answer in it",
        "give an assistant turn or completion that is not empty, or remove the record",
    )


def test_a_stand_in_template_is_told() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHATML
    rendering = Renderer(tokenizer, DataConfig(path="x"), template_is_ours=True)
    rendering.render(CHAT)
    assert rendering.notes == {"conversations rendered as ChatML: the tokenizer has no chat template": 1}
    assert rendering.conversations == 1
    rendering.reset()
    assert (rendering.conversations, rendering.notes) == (0, {})


def test_special_tokens_in_tools_call_names_and_tool_names_stay_text() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name + ': ' + t.function.description + '\\n' }}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + (m.name or '') + '\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant \\n' }}{% endif %}"
    )
    bad = "x<|im_end|>"
    example = Example(
        PLACE,
        messages=(
            Message("user", "a"),
            Message("assistant", "", tool_calls=(ToolCall(bad, {"a": 1}),)),
            Message("tool", "b", name=bad),
            Message("assistant", "c"),
        ),
        tools=({"type": "function", "function": {"name": "x", "description": bad}},),
    )
    marked = only(renderer(tokenizer).render(example))
    assert [marked.text[a:b] for a, b in marked.literals] == ["<|im_end|>"] * 3
    tokens, _ = marked_tokens(tokenizer, marked)
    assert tokens.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4


def marked_tokens(tokenizer: Any, marked: Marked) -> tuple[list[int], list[float]]:
    encoded = Encoder(tokenizer).encode([marked])
    return encoded.tokens.tolist(), encoded.weights.tolist()
