from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AddedToken

from tests.families import CHATML, train_tokenizer
from tunesmith.data.template import Rendered, Renderer
from tunesmith.errors import UserError
from tunesmith.types import Example, Message, Piece, Place

PLACE = Place("chats.jsonl", 7)
END = "<|im_end|>"

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""CHATML, which says itself what is learnt."""

FORGETS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ 'cut' }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Shortens all answers but the last, as templates of reasoning models do: rendering it in pieces is not sound."""

CHATS = {
    "one turn": [("user", "What follows 3?"), ("assistant", "After 3 comes 4.")],
    "several turns": [("user", "a"), ("assistant", "b"), ("user", "c d"), ("assistant", "e f. ")],
    "system": [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    "unicode": [("user", "你好 é"), ("assistant", "grüße, 🙂\n\ncafe\u0301"), ("user", "🙂"), ("assistant", "\u00a0é")],
    "white space": [("user", " a "), ("assistant", "  def f():\n    return 1\n"), ("user", "\n"), ("assistant", " ")],
    "the prompt's words": [("user", "assistant\nb"), ("assistant", "b"), ("user", "b"), ("assistant", "user\nb")],
    "unanswered end": [("user", "a"), ("assistant", "b"), ("user", "c")],
    "an empty answer among others": [("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", "d")],
}


def chat(*turns: tuple[str, str]) -> Example:
    return Example(PLACE, messages=tuple(Message(*turn) for turn in turns))


def text(*pieces: tuple[str, bool]) -> Example:
    return Example(PLACE, pieces=tuple(Piece(*piece) for piece in pieces))


def dicts(example: Example) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in example.messages]


def learnt(tokenizer: Any, rendered: Rendered) -> str:
    """The learnt tokens as text."""
    assert len(rendered.tokens) == len(rendered.weights)
    return tokenizer.decode([t for t, w in zip(rendered.tokens, rendered.weights, strict=True) if w])


def with_template(template: str | None) -> Any:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def refusal(tokenizer: Any, example: Example, learn_all: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        Renderer(tokenizer, learn_all).render(example)
    return str(caught.value)


@pytest.mark.parametrize("name", CHATS)
def test_exactly_the_answers_and_their_end_of_turn_are_learnt(name: str, tokenizer: Any) -> None:
    rendered = Renderer(tokenizer, learn_all=False).render(chat(*CHATS[name]))
    answers = [content for role, content in CHATS[name] if role == "assistant" and content]
    assert learnt(tokenizer, rendered) == "".join(answer + END for answer in answers)
    assert set(rendered.weights) == {0.0, 1.0}
    assert tokenizer.decode(rendered.tokens) == "".join(
        f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in CHATS[name]
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1), min_size=2, max_size=6))
def test_exactly_the_answers_are_learnt_whatever_they_hold(tokenizer: Any, contents: list[str]) -> None:
    turns = [(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    rendered = Renderer(tokenizer, learn_all=False).render(chat(*turns))
    assert learnt(tokenizer, rendered) == "".join(answer + END for answer in contents[1::2])


@pytest.mark.parametrize("name", [name for name in CHATS if "empty" not in name])
def test_marks_in_the_template_give_what_transformers_gives_and_what_prefixes_give(name: str, tokenizer: Any) -> None:
    marked, example = with_template(MARKED), chat(*CHATS[name])
    rendered = Renderer(marked, learn_all=False).render(example)
    expected = marked.apply_chat_template(dicts(example), return_dict=True, return_assistant_tokens_mask=True)
    assert rendered.tokens == expected["input_ids"]
    assert rendered.weights == expected["assistant_masks"]
    assert rendered == Renderer(tokenizer, learn_all=False).render(example)


@pytest.mark.parametrize(
    "mark", ["{% generation %}", "{%- generation %}", "{% generation -%}", "{%generation%}", "{%- generation -%}"]
)
def test_marks_are_found_in_every_spelling(mark: str) -> None:
    """A template that can only be used by its marks, since its prefixes differ."""
    content = "(message['content'] if loop.last else 'cut')"
    template = MARKED.replace("{% generation %}{{ message['content']", "{% generation %}{{ " + content)
    tokenizer = with_template(template.replace("{% generation %}", mark))
    rendered = Renderer(tokenizer, learn_all=False).render(chat(*CHATS["several turns"]))
    assert learnt(tokenizer, rendered) == "cut<|im_end|>e f. <|im_end|>"


def test_a_template_that_renders_prefixes_otherwise_is_refused_with_the_first_difference() -> None:
    tokenizer = with_template(FORGETS)
    turns = [("user", "Hi"), ("assistant", "A long answer"), ("user", "And?"), ("assistant", "Yes")]
    assert refusal(tokenizer, chat(*turns)) == (
        "chats.jsonl:7: message 2: the model's chat template renders the beginning of a conversation otherwise than the "
        "same turns inside it, so the loss cannot be placed: 'im_start|>assistant\\nA long answer<|im_en' became "
        "'im_start|>assistant\\ncut<|im_end|>\\n<|im_s'; use single-turn records, or a template with {% generation %} marks"
    )
    rendered = Renderer(tokenizer, learn_all=False).render(chat(*turns[:2]))
    assert learnt(tokenizer, rendered) == "A long answer<|im_end|>"
    assert set(Renderer(tokenizer, learn_all=True).render(chat(*turns)).weights[1:]) == {1.0}


def test_a_template_that_refuses_the_conversation() -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    for template in (no_system + CHATML, no_system + MARKED):
        assert refusal(with_template(template), chat(*CHATS["system"])) == (
            "chats.jsonl:7: the model's chat template refuses this conversation: System role not supported"
        )


def test_a_template_that_is_no_jinja() -> None:
    assert refusal(with_template("{% for message in messages %}"), chat(*CHATS["one turn"])).startswith(
        "chats.jsonl:7: the model's chat template refuses this conversation: "
    )


def test_a_model_without_a_chat_template() -> None:
    assert refusal(with_template(None), chat(*CHATS["one turn"])) == (
        "chats.jsonl:7: a conversation, but the model's tokenizer has no chat template; "
        "set model.chat_template to a Jinja file or to chatml, or use an instruction-tuned model"
    )


@pytest.mark.parametrize(
    "example",
    [
        chat(("user", "a")),
        chat(("user", "a"), ("assistant", "")),
        text(("a", False), ("", True)),
        text(("", True)),
    ],
)
def test_a_record_without_an_answer(example: Example, tokenizer: Any) -> None:
    assert refusal(tokenizer, example) == (
        "chats.jsonl:7: nothing to learn from: no answer in it; "
        "give an assistant turn or completion that is not empty, or remove the record"
    )


def test_text_that_is_no_unicode_is_refused_with_its_place(tokenizer: Any) -> None:
    """JSON can hold half of a surrogate pair; no tokenizer takes it."""
    for example in (chat(("user", "a"), ("assistant", "\ud83d")), text(("\ud83d", True))):
        assert refusal(tokenizer, example).startswith("chats.jsonl:7: ")


def test_a_completion_is_learnt_with_one_end_and_its_prompt_is_not(tokenizer: Any) -> None:
    rendered = Renderer(tokenizer, learn_all=False).render(text(("2 + 2 =", False), (" 4 ü", True)))
    assert tokenizer.decode(rendered.tokens) == "2 + 2 = 4 ü<|im_end|>"
    assert learnt(tokenizer, rendered) == " 4 ü<|im_end|>"


def test_an_end_that_the_text_has_already_is_not_doubled(tokenizer: Any) -> None:
    rendered = Renderer(tokenizer, learn_all=False).render(text(("a ", False), ("b<|im_end|>", True)))
    assert tokenizer.decode(rendered.tokens) == "a b<|im_end|>"
    assert learnt(tokenizer, rendered) == "b<|im_end|>"


def test_an_end_that_the_tokenizer_adds_is_learnt() -> None:
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    rendered = Renderer(tokenizer, learn_all=False).render(text(("a ", False), ("b", True)))
    assert tokenizer.decode(rendered.tokens) == "a b<|im_end|>"
    assert learnt(tokenizer, rendered) == "b<|im_end|>"


def test_a_beginning_that_the_tokenizer_adds_is_not_learnt() -> None:
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    plain = Renderer(tokenizer, learn_all=False).render(text(("What follows", True)))
    assert tokenizer.decode(plain.tokens) == "<|im_start|>What follows<|im_end|>"
    assert learnt(tokenizer, plain) == "What follows<|im_end|>"
    conversation = Renderer(tokenizer, learn_all=False).render(chat(*CHATS["one turn"]))
    assert conversation.tokens.count(1) == 2  # the template's own


def test_a_tokenizer_without_an_end_adds_none() -> None:
    tokenizer = train_tokenizer()
    tokenizer.eos_token = None
    rendered = Renderer(tokenizer, learn_all=False).render(text(("a", False), ("b", True)))
    assert (tokenizer.decode(rendered.tokens), learnt(tokenizer, rendered)) == ("ab", "b")


def test_plain_text_is_learnt_but_for_its_first_token(tokenizer: Any) -> None:
    for learn_all in (False, True):
        rendered = Renderer(tokenizer, learn_all).render(text(("a b", True)))
        assert tokenizer.decode(rendered.tokens) == "a b<|im_end|>"
        assert rendered.weights == [0.0] + [1.0] * (len(rendered.tokens) - 1)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_learn_all_learns_every_token_but_the_first(template: str) -> None:
    tokenizer = with_template(template)
    for example in (chat(*CHATS["system"]), chat(("user", "a")), text(("a b", False), ("c", True))):
        rendered = Renderer(tokenizer, learn_all=True).render(example)
        assert rendered.weights == [0.0] + [1.0] * (len(rendered.tokens) - 1)
    of_answers = Renderer(tokenizer, learn_all=False).render(chat(*CHATS["system"]))
    assert Renderer(tokenizer, learn_all=True).render(chat(*CHATS["system"])).tokens == of_answers.tokens


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("name", [name for name, turns in CHATS.items() if turns[-1][0] == "assistant"])
def test_the_tokens_of_a_rendered_prompt_begin_the_training_tokens(name: str, template: str) -> None:
    """What the model sees when it is asked is what it saw in training."""
    tokenizer, example = with_template(template), chat(*CHATS[name])
    renderer = Renderer(tokenizer, learn_all=False)
    rendered = renderer.render(example)
    prompt_text = renderer.chat_text(dicts(example)[:-1], PLACE, prompt=True)
    prompt = tokenizer(prompt_text, add_special_tokens=False).input_ids
    assert rendered.tokens[: len(prompt)] == prompt
    assert tokenizer.decode(rendered.tokens[len(prompt) :]) == CHATS[name][-1][1] + "<|im_end|>\n"


def test_white_space_is_learnt_where_the_tokenizer_trims_it_from_offsets() -> None:
    """As GPT-NeoX's does: a token of nothing but spaces then has an empty span."""
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    rendered = Renderer(tokenizer, learn_all=False).render(chat(*CHATS["white space"]))
    assert learnt(tokenizer, rendered) == "  def f():\n    return 1\n<|im_end|> <|im_end|>"
    rendered = Renderer(tokenizer, learn_all=False).render(text(("a", False), (" b  c", True)))
    assert learnt(tokenizer, rendered) == " b  c<|im_end|>"


def test_generation_stops_at_an_end_of_turn_that_has_no_name_too() -> None:
    """As Phi-3's <|end|>: a special token, but none of those that the tokenizer names."""
    tokenizer = train_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = CHATML.replace(END, "<|end|>")
    rendered = Renderer(tokenizer, learn_all=False).render(chat(*CHATS["one turn"]))
    assert learnt(tokenizer, rendered) == "After 3 comes 4.<|end|>"


def test_a_template_without_an_end_of_turn_is_learnt_to_the_end_of_the_answer() -> None:
    template = "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    tokenizer = with_template(template + "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}")
    rendered = Renderer(tokenizer, learn_all=False).render(chat(*CHATS["several turns"]))
    assert learnt(tokenizer, rendered) == "b\ne f. \n"


def test_a_slow_tokenizer_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = with_template(CHATML)
    monkeypatch.setattr(type(slow), "is_fast", False)
    monkeypatch.setattr(slow, "name_or_path", "org/model")
    assert refusal(slow, chat(*CHATS["one turn"])) == (
        "org/model: needs a fast tokenizer (tokenizer.json) to place the loss"
    )
