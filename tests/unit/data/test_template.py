"""Which tokens are learnt, and how much: exact, on templates of each kind that are in use."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from tests.families import CHATML, train_tokenizer
from tunesmith.config import DataConfig
from tunesmith.data.encode import Encoder
from tunesmith.data.render import Marked, Renderer
from tunesmith.errors import DataError, UserError
from tunesmith.models.load import chatml_for
from tunesmith.types import Example, Form, Message, Piece, Place, ToolCall

PLACE = Place("chats.jsonl", 7)
END = "<|im_end|>"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)
"""CHATML, which says itself what is learnt."""

FORGETS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ 'cut' }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
"""Shortens all answers but the last."""

TRIMS = CHATML.replace("message['content']", "message['content'] | trim")

THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
"""Shows the thought of the last answer alone, and an empty one where it has none, as Qwen3's does."""

THINKS_INLINE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set content = m.content %}"
    "{% if not loop.last %}{% set content = m.content.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""Knows thoughts in the content alone, and begins answers with <think>, as QwQ's does."""

SYSTEM_LAST = (
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if m == last and messages[0].role == 'system' %}{{ '[INST] ' + messages[0].content + ' ' + m.content + ' [/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
"""Puts the system's words into the last question, as Mistral's does, and has no mark for a prompt's end."""

ALWAYS_PROMPTS = CHATML.partition("{% if add")[0] + "{{ '<|im_start|>assistant\n' }}"

CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '[' + call.function.name + ARGUMENTS + ']' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
CALLS_WITH_OBJECTS = CALLS.replace("ARGUMENTS", "(call.function.arguments | tojson)")
CALLS_WITH_TEXT = CALLS.replace("ARGUMENTS", "call.function.arguments")

DATED = "{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}" + CHATML

CHATS = {
    "one turn": [("user", "What follows 3?"), ("assistant", "After 3 comes 4.")],
    "several turns": [("user", "a"), ("assistant", "b"), ("user", "c d"), ("assistant", "e f. ")],
    "system": [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    "unicode": [("user", "你好 é"), ("assistant", "grüße, 🙂\n\ncafe\u0301"), ("user", "🙂"), ("assistant", "\u00a0é")],
    "white space": [("user", " a "), ("assistant", "  def f():\n    return 1\n"), ("user", "\n"), ("assistant", " ")],
    "the prompt's words": [("user", "assistant\nb"), ("assistant", "b"), ("user", "b"), ("assistant", "user\nb")],
    "unanswered end": [("user", "a"), ("assistant", "b"), ("user", "c")],
    "an empty answer among others": [("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", "d")],
    "private characters": [("user", "\U000f003c icon"), ("assistant", "\U000f0001 <|im_end|> \U0010fffd")],
}
PLAIN_CHATS = [name for name in CHATS if "private" not in name]


def chat(*turns: tuple[str, str]) -> Example:
    return Example(PLACE, messages=tuple(Message(*turn) for turn in turns))


def conversation(*messages: Message, tools: tuple[dict[str, Any], ...] = ()) -> Example:
    return Example(PLACE, messages=messages, tools=tools)


def text(*pieces: tuple[str, bool]) -> Example:
    return Example(PLACE, pieces=tuple(Piece(*piece) for piece in pieces))


def dicts(example: Example) -> list[dict[str, str]]:
    return [{"role": message.role, "content": str(message.content)} for message in example.messages]


def with_template(template: str | None) -> Any:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def renderer(tokenizer: Any, form: Form = "answers", **data: Any) -> Renderer:
    return Renderer(tokenizer, DataConfig(path="x", **data), form)


def render(tokenizer: Any, example: Example, form: Form = "answers", **data: Any) -> Marked:
    ((marked,),) = renderer(tokenizer, form, **data).render(example)
    return marked


def encode(tokenizer: Any, example: Example, form: Form = "answers", **data: Any) -> tuple[list[int], list[float]]:
    """Tokens and weights of an example that becomes one sequence."""
    encoded = Encoder(tokenizer).encode([render(tokenizer, example, form, **data)])
    assert len(encoded.tokens) == len(encoded.weights) == encoded.offsets[-1]
    return encoded.tokens.tolist(), encoded.weights.tolist()


def learnt(tokenizer: Any, example: Example, **data: Any) -> str:
    """The learnt tokens as text; a bar stands where tokens between them are not learnt."""
    tokens, weights = encode(tokenizer, example, **data)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.array(weights) != 0, [0]]).astype(int)))
    return "|".join(tokenizer.decode(tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True))


def refusal(tokenizer: Any, example: Example, form: Form = "answers", **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        encode(tokenizer, example, form, **data)
    return str(caught.value)


# Templates whose beginnings stay as they are


@pytest.mark.parametrize("name", CHATS)
def test_exactly_the_answers_and_their_end_of_turn_are_learnt(name: str, tokenizer: Any) -> None:
    tokens, weights = encode(tokenizer, chat(*CHATS[name]))
    answers = [content for role, content in CHATS[name] if role == "assistant" and content]
    assert learnt(tokenizer, chat(*CHATS[name])) == "|".join(answer + END for answer in answers)
    assert set(weights) == {0.0, 1.0}
    assert tokenizer.decode(tokens) == "".join(
        f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in CHATS[name]
    )


ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ANY_TEXT, min_size=2, max_size=6))
def test_exactly_the_answers_are_learnt_whatever_they_hold(tokenizer: Any, contents: list[str]) -> None:
    turns = [(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    spans = render(tokenizer, chat(*turns)).spans
    whole = render(tokenizer, chat(*turns)).text
    assert [whole[start:stop] for start, stop, _ in spans] == [answer + END for answer in contents[1::2]]
    tokens, weights = encode(tokenizer, chat(*turns))
    assert tokens == tokenizer(whole, add_special_tokens=False).input_ids
    learnt_ids = [token for token, weight in zip(tokens, weights, strict=True) if weight]
    assert learnt_ids == [
        token for answer in contents[1::2] for token in tokenizer(answer + END, add_special_tokens=False).input_ids
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(ANY_TEXT, min_size=2, max_size=6))
def test_templates_that_trim_are_learnt_trimmed_whatever_the_turns_hold(contents: list[str]) -> None:
    turns = [(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    marked = render(TRIMMING, chat(*turns))
    assert [marked.text[start:stop] for start, stop, _ in marked.spans] == [c.strip() + END for c in contents[1::2]]


TRIMMING = with_template(TRIMS)


@pytest.mark.parametrize("name", [name for name, turns in CHATS.items() if turns[-1][0] == "assistant"])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_tokens_of_a_rendered_prompt_begin_the_training_tokens(name: str, template: str) -> None:
    """What the model sees when it is asked is what it saw in training."""
    tokenizer, example = with_template(template), chat(*CHATS[name])
    tokens, _ = encode(tokenizer, example)
    prompt = tokenizer.apply_chat_template(dicts(example)[:-1], add_generation_prompt=True, return_dict=False)
    assert tokens[: len(prompt)] == prompt
    assert tokenizer.decode(tokens[len(prompt) :]) == CHATS[name][-1][1] + "<|im_end|>\n"


def test_a_plain_conversation_costs_one_rendering(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = renderer(tokenizer)
    own.render(chat(*CHATS["system"]))
    calls = []
    jinja = type(own.template)._jinja
    monkeypatch.setattr(type(own.template), "_jinja", lambda *a, **k: calls.append(1) or jinja(*a, **k))
    own.render(chat(*[(role, content * 2) for role, content in CHATS["system"]]))
    assert len(calls) == 1


def test_generation_stops_at_an_end_of_turn_that_has_no_name_too() -> None:
    """As Phi-3's <|end|>: a special token, but none of those that the tokenizer names."""
    tokenizer = train_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = CHATML.replace(END, "<|end|>")
    assert learnt(tokenizer, chat(*CHATS["one turn"])) == "After 3 comes 4.<|end|>"


def test_a_template_without_an_end_of_turn_is_learnt_to_the_end_of_the_answer_and_says_so() -> None:
    template = "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    tokenizer = with_template(template + "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}")
    assert learnt(tokenizer, chat(*CHATS["several turns"])) == "b\n|e f. \n"
    own = renderer(tokenizer)
    own.render(chat(*CHATS["several turns"]))
    assert own.notes == {"conversations without an end-of-turn token: the model does not learn where to stop": 1}


# Marks


@pytest.mark.parametrize("name", [name for name in PLAIN_CHATS if "empty" not in name])
def test_marks_in_the_template_give_what_transformers_gives_and_what_prefixes_give(name: str, tokenizer: Any) -> None:
    marked, example = with_template(MARKED), chat(*CHATS[name])
    tokens, weights = encode(marked, example)
    expected = marked.apply_chat_template(dicts(example), return_dict=True, return_assistant_tokens_mask=True)
    assert tokens == expected["input_ids"]
    assert weights == expected["assistant_masks"]
    assert (tokens, weights) == encode(tokenizer, example)


@pytest.mark.parametrize(
    "mark", ["{% generation %}", "{%- generation %}", "{% generation -%}", "{%generation%}", "{%- generation -%}"]
)
def test_marks_are_found_in_every_spelling(mark: str) -> None:
    """A template that can only be used by its marks, since its prefixes differ."""
    content = "(message['content'] if loop.last else 'cut')"
    template = MARKED.replace("{% generation %}{{ message['content']", "{% generation %}{{ " + content)
    tokenizer = with_template(template.replace("{% generation %}", mark))
    assert learnt(tokenizer, chat(*CHATS["several turns"])) == "cut<|im_end|>|e f. <|im_end|>"


def test_marks_that_are_fewer_than_the_answers_are_refused() -> None:
    template = MARKED.replace("message['role'] == 'assistant'", "message['role'] == 'assistant' and loop.last")
    assert refusal(with_template(template), chat(*CHATS["several turns"])) == (
        "chats.jsonl:7: the model's chat template marks 1 stretches as generated, but the conversation has 2 assistant "
        "turns, so their weights cannot be placed: "
        "set model.chat_template to a template that marks each turn, or one without {% generation %} marks"
    )


# Templates that change what came before


def test_a_template_that_forgets_answers_is_refused_but_for_the_last() -> None:
    tokenizer = with_template(FORGETS)
    turns = [("user", "Hi"), ("assistant", "A long answer"), ("user", "And?"), ("assistant", "Yes")]
    assert refusal(tokenizer, chat(*turns)) == (
        "chats.jsonl:7 messages[1]: the model's chat template leaves what this turn says out: "
        "set data.learn to each, or model.chat_template to a template that keeps it"
    )
    assert learnt(tokenizer, chat(*turns[:2])) == "A long answer<|im_end|>"
    assert learnt(tokenizer, chat(*turns), learn="last") == "Yes<|im_end|>"
    assert set(encode(tokenizer, chat(*turns), form="text")[1][1:]) == {1.0}


def test_a_template_that_looks_at_the_words_is_refused_with_the_first_difference() -> None:
    """Sentinels change what it looks at."""
    shouts = FORGETS.replace("'cut'", "message['content'] | length ~ message['content']")
    turns = [("user", "Hi"), ("assistant", "A long answer"), ("user", "And?"), ("assistant", "Yes")]
    assert refusal(with_template(shouts), chat(*turns)) == (
        "chats.jsonl:7 messages[1]: the model's chat template renders the beginning of a conversation otherwise than the "
        "same turns inside it, so the loss cannot be placed: 'im_start|>assistant\\nA long answer<|im_en' became "
        "'im_start|>assistant\\n13A long answer<|im_'; "
        "set data.learn to each, or model.chat_template to a template with {% generation %} marks".replace("'; ", "': ")
    )


THOUGHTFUL = (
    Message("user", "a"), Message("assistant", "b", reasoning="first"),
    Message("user", "c"), Message("assistant", "d", reasoning="second"),
)  # fmt: skip


def test_thoughts_that_the_template_drops_leave_their_turn_unlearnt() -> None:
    """Else the model would learn to answer without a thought."""
    tokenizer, own = with_template(THINKS), renderer(with_template(THINKS))
    assert learnt(tokenizer, conversation(*THOUGHTFUL)) == "<think>\nsecond\n</think>\n\nd<|im_end|>"
    own.render(conversation(*THOUGHTFUL))
    assert own.notes == {"turns whose reasoning the chat template drops, not learnt": 1}
    each = [sample for (sample,) in renderer(tokenizer, learn="each").render(conversation(*THOUGHTFUL))]
    assert [marked.text[slice(*marked.spans[0][:2])] for marked in each] == [
        "<think>\nfirst\n</think>\n\nb<|im_end|>", "<think>\nsecond\n</think>\n\nd<|im_end|>",
    ]  # fmt: skip


def test_answers_without_thoughts_are_learnt_as_the_template_shows_them() -> None:
    assert learnt(with_template(THINKS), chat(*CHATS["several turns"])) == (
        "b<|im_end|>|<think>\n\n</think>\n\ne f. <|im_end|>"
    )


def test_thoughts_stand_in_the_content_where_the_template_looks_for_them() -> None:
    tokenizer = with_template(THINKS_INLINE)
    assert learnt(tokenizer, conversation(*THOUGHTFUL[:2])) == "first\n</think>\n\nb<|im_end|>"
    inline = chat(("user", "a"), ("assistant", "<think>\nfirst\n</think>\n\nb"))
    assert encode(tokenizer, inline) == encode(tokenizer, conversation(*THOUGHTFUL[:2]))
    assert learnt(tokenizer, conversation(*THOUGHTFUL)) == "second\n</think>\n\nd<|im_end|>"


def test_a_template_that_knows_no_thoughts_is_learnt_without_them_and_says_so(tokenizer: Any) -> None:
    assert learnt(tokenizer, conversation(*THOUGHTFUL)) == "b<|im_end|>|d<|im_end|>"
    own = renderer(tokenizer)
    own.render(conversation(*THOUGHTFUL))
    assert own.notes == {"turns learnt without their reasoning: the chat template knows none": 2}


def test_a_system_message_in_the_last_question_is_not_learnt() -> None:
    tokenizer = with_template(SYSTEM_LAST)
    assert learnt(tokenizer, chat(*CHATS["system"])) == " b<|im_end|>| d<|im_end|>"
    assert render(tokenizer, chat(*CHATS["system"])).text == (
        "[INST] a [/INST] b<|im_end|>[INST] Be brief. c [/INST] d<|im_end|>"
    )


def test_a_prompt_that_the_template_always_appends_is_not_learnt() -> None:
    tokenizer = with_template(ALWAYS_PROMPTS)
    assert learnt(tokenizer, chat(*CHATS["several turns"])) == "b<|im_end|>|e f. <|im_end|>"
    without_token = (
        "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n' }}{% endfor %}{{ '### assistant\n' }}"
    )
    assert learnt(with_template(without_token), chat(*CHATS["several turns"])) == "b|e f. "


# What is learnt, and how much


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_weights_of_messages(template: str) -> None:
    tokenizer = with_template(template)
    weighted = conversation(
        Message("user", "a", weight=0.25), Message("assistant", "b", weight=0.5),
        Message("user", "c"), Message("assistant", "d", weight=0.0), Message("user", "e"), Message("assistant", "f"),
    )  # fmt: skip
    marked = render(tokenizer, weighted)
    assert [(marked.text[a:b], weight) for a, b, weight in marked.spans] == [
        ("a<|im_end|>", 0.25), ("b<|im_end|>", 0.5), ("f<|im_end|>", 1.0),
    ]  # fmt: skip
    tokens, weights = encode(tokenizer, weighted)
    by_weight = {w: tokenizer.decode([t for t, x in zip(tokens, weights, strict=True) if x == w]) for w in set(weights)}
    assert {w: by_weight[w] for w in (0.25, 0.5, 1.0)} == {0.25: "a<|im_end|>", 0.5: "b<|im_end|>", 1.0: "f<|im_end|>"}
    everything = render(tokenizer, weighted, learn="all")
    assert everything.base == 1.0
    assert [(everything.text[a:b], weight) for a, b, weight in everything.spans] == [
        ("a<|im_end|>", 0.25), ("b<|im_end|>", 0.5), ("d<|im_end|>", 0.0),
    ]  # fmt: skip


def test_learning_the_last_answer_or_each_in_a_sample_of_its_own(tokenizer: Any) -> None:
    example = chat(*CHATS["system"], ("user", "e"), ("assistant", ""), ("user", "g"), ("assistant", "h"))
    assert learnt(tokenizer, example, learn="last") == "h<|im_end|>"
    samples = [sample for (sample,) in renderer(tokenizer, learn="each").render(example)]
    assert [[marked.text[a:b] for a, b, _ in marked.spans] for marked in samples] == [
        ["b<|im_end|>"], ["d<|im_end|>"], ["h<|im_end|>"],
    ]  # fmt: skip
    assert [len(marked.text.split(END)) - 1 for marked in samples] == [3, 5, 9]


def test_each_leaves_out_answers_of_no_weight(tokenizer: Any) -> None:
    example = conversation(
        Message("user", "a"), Message("assistant", "b", weight=0.0), Message("user", "c"), Message("assistant", "d")
    )
    assert learnt(tokenizer, example, learn="each") == "d<|im_end|>"
    assert refusal(tokenizer, conversation(*example.messages[:2]), learn="each").startswith(
        "chats.jsonl:7: nothing to learn from: no answer in it: "
    )


@pytest.mark.parametrize("template", [CHATML, MARKED, FORGETS, THINKS])
def test_learning_all_learns_every_token_but_the_first(template: str) -> None:
    tokenizer = with_template(template)
    for example in (chat(*CHATS["system"]), chat(("user", "a")), text(("a b", False), ("c", True))):
        for all_of_it in ({"form": "text"}, {"learn": "all"}):
            tokens, weights = encode(tokenizer, example, **all_of_it)
            assert weights == [0.0] + [1.0] * (len(tokens) - 1)


# Tools


WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
ASKED = (
    Message("user", "a"),
    Message("assistant", tool_calls=(ToolCall("weather", {"place": "Oslo"}), ToolCall("weather", {"place": "Lima"}))),
    Message("tool", "rain"), Message("tool", "sun"), Message("assistant", "It rains."),
)  # fmt: skip


@pytest.mark.parametrize("template", [CALLS_WITH_OBJECTS, CALLS_WITH_TEXT])
def test_calls_are_learnt_and_what_tools_say_is_not(template: str) -> None:
    """Arguments go into the template as it wants them: as an object, or as JSON text."""
    assert learnt(with_template(template), conversation(*ASKED, tools=(WEATHER,))) == (
        '[weather{"place": "Oslo"}][weather{"place": "Lima"}]<|im_end|>|It rains.<|im_end|>'
    )


def test_calls_whose_history_changes_are_learnt_whole() -> None:
    """Thoughts before calls are dropped later, as Qwen3 does: the place is found by sentinels."""
    template = CALLS_WITH_OBJECTS.replace(
        "(m.content or '')",
        "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content and loop.last else '') + m.content",
    )
    thoughtful = Message("assistant", reasoning="hm", tool_calls=ASKED[1].tool_calls)
    tokenizer = with_template(template)
    example = conversation(*ASKED[:1], thoughtful, *ASKED[2:], tools=(WEATHER,))
    assert learnt(tokenizer, example) == "It rains.<|im_end|>"
    plain = conversation(*ASKED, Message("user", "b"), Message("assistant", "c", reasoning="hm"), tools=(WEATHER,))
    assert learnt(tokenizer, plain) == (
        '[weather{"place": "Oslo"}][weather{"place": "Lima"}]<|im_end|>|It rains.<|im_end|>|<think>hm</think>c<|im_end|>'
    )


def test_tools_that_answer_without_an_id_answer_in_turn() -> None:
    template = CALLS_WITH_OBJECTS.replace("call.function.name", "call.id + call.function.name")
    template = template.replace("m.role + '\n'", "m.role + '\n' + (m.tool_call_id or '')")
    marked = render(with_template(template), conversation(*ASKED, tools=(WEATHER,)))
    assert marked.text == (
        '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[call00000weather{"place": "Oslo"}]'
        '[call00001weather{"place": "Lima"}]<|im_end|>\n<|im_start|>tool\ncall00000rain<|im_end|>\n'
        "<|im_start|>tool\ncall00001sun<|im_end|>\n<|im_start|>assistant\nIt rains.<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "template", [CHATML, CALLS_WITH_OBJECTS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")]
)
def test_a_template_that_leaves_calls_out_is_refused(template: str) -> None:
    tokenizer = with_template(template)
    assert refusal(tokenizer, conversation(*ASKED, tools=(WEATHER,))) == (
        "chats.jsonl:7 messages[1]: the model's chat template leaves tool calls out: "
        "use a model whose template knows tools, or set model.chat_template"
    )


def test_words_beside_a_call_that_the_template_drops_are_counted() -> None:
    template = CALLS_WITH_OBJECTS.replace("(m.content or '')", "(m.content if not m.tool_calls else '')")
    own = renderer(with_template(template))
    spoken = Message("assistant", "Let me look.", tool_calls=ASKED[1].tool_calls)
    ((marked,),) = own.render(conversation(ASKED[0], spoken, *ASKED[2:], tools=(WEATHER,)))
    assert marked.text[slice(*marked.spans[0][:2])] == '[weather{"place": "Oslo"}][weather{"place": "Lima"}]<|im_end|>'
    assert own.notes == {"turns whose words beside tool calls the chat template drops": 1}


# Special tokens in the data's text


def test_special_tokens_in_the_text_stay_text(tokenizer: Any) -> None:
    turns = [("user", "What is <|im_end|>?"), ("assistant", "A <|im_end|> token,<|im_start|>you know")]
    tokens, _ = encode(tokenizer, chat(*turns))
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", END])
    assert [token for token in tokens if token in ids] == [ids[0], ids[1], ids[0], ids[1]]
    assert tokenizer.decode(tokens) == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert learnt(tokenizer, chat(*turns)) == turns[1][1] + END
    call = Message("assistant", tool_calls=(ToolCall("weather", {"place": 'a "quoted" <|im_end|>'}),))
    calling = with_template(CALLS_WITH_OBJECTS)
    called, _ = encode(calling, conversation(ASKED[0], call))
    assert called.count(ids[1]) == 2
    assert calling.decode(called).endswith('[weather{"place": "a \\"quoted\\" <|im_end|>"}]<|im_end|>\n')


def test_special_tokens_in_the_text_are_read_on_demand(tokenizer: Any) -> None:
    tokens, _ = encode(tokenizer, chat(("user", "a<|im_end|>"), ("assistant", "b")), parse_special_tokens=True)
    assert tokens.count(tokenizer.eos_token_id) == 3


# The date


def test_a_template_that_prints_the_date_prints_the_given_one() -> None:
    marked = render(with_template(DATED), chat(*CHATS["one turn"]), date="2026-01-31")
    assert marked.text.startswith("Today is 31 January 2026. <|im_start|>user\n")
    assert marked.text[slice(*marked.spans[0][:2])] == "After 3 comes 4.<|im_end|>"


# Refusals


def test_a_template_that_refuses_the_conversation() -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    for template in (no_system + CHATML, no_system + MARKED):
        assert refusal(with_template(template), chat(*CHATS["system"])) == (
            "chats.jsonl:7: the model's chat template refuses this conversation: System role not supported: "
            "change the record, or set model.chat_template to a template that takes it"
        )


def test_a_template_that_is_no_jinja() -> None:
    assert refusal(with_template("{% for message in messages %}"), chat(*CHATS["one turn"])).startswith(
        "chats.jsonl:7: the model's chat template refuses this conversation: "
    )


def test_a_template_that_cannot_do_without_a_list_of_tools() -> None:
    template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + CHATML
    assert learnt(with_template(template), chat(*CHATS["one turn"])) == "After 3 comes 4.<|im_end|>"


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
        "chats.jsonl:7: nothing to learn from: no answer in it: "
        "give an assistant turn or completion that is not empty, or remove the record"
    )


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = with_template(CHATML)
    monkeypatch.setattr(type(slow), "is_fast", False)
    monkeypatch.setattr(slow, "name_or_path", "org/model")
    with pytest.raises(UserError, match=r"^org/model: needs a fast tokenizer \(tokenizer.json\) to place the loss$"):
        Encoder(slow)


def test_chatml_stands_in_for_a_template_that_is_missing() -> None:
    """Turns end with <|im_end|> where that is a token, else with the tokenizer's end of text."""
    tokenizer = with_template(chatml_for(train_tokenizer()))
    assert learnt(tokenizer, chat(*CHATS["one turn"])) == "After 3 comes 4.<|im_end|>"
    base = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(train_tokenizer().backend_tokenizer.to_str().replace(END, "</s>")),
        eos_token="</s>",
    )
    base.chat_template = chatml_for(base)
    assert learnt(base, chat(*CHATS["one turn"])) == "After 3 comes 4.</s>"


# Plain text


def test_a_completion_is_learnt_with_one_end_and_its_prompt_is_not(tokenizer: Any) -> None:
    example = text(("2 + 2 =", False), (" 4 ü", True))
    assert tokenizer.decode(encode(tokenizer, example)[0]) == "2 + 2 = 4 ü<|im_end|>"
    assert learnt(tokenizer, example) == " 4 ü<|im_end|>"


def test_an_end_that_the_text_has_already_is_not_doubled(tokenizer: Any) -> None:
    example = text(("a ", False), ("b<|im_end|>", True))
    assert tokenizer.decode(encode(tokenizer, example, parse_special_tokens=True)[0]) == "a b<|im_end|>"
    assert learnt(tokenizer, example, parse_special_tokens=True) == "b<|im_end|>"
    assert tokenizer.decode(encode(tokenizer, example)[0]) == "a b<|im_end|><|im_end|>"  # the first one is text


def test_an_end_that_the_tokenizer_adds_is_learnt() -> None:
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    example = text(("a ", False), ("b", True))
    assert tokenizer.decode(encode(tokenizer, example)[0]) == "a b<|im_end|>"
    assert learnt(tokenizer, example) == "b<|im_end|>"


def test_a_beginning_that_the_tokenizer_adds_is_not_learnt() -> None:
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    plain = text(("What follows", True))
    assert tokenizer.decode(encode(tokenizer, plain)[0]) == "<|im_start|>What follows<|im_end|>"
    assert learnt(tokenizer, plain) == "What follows<|im_end|>"
    assert encode(tokenizer, chat(*CHATS["one turn"]))[0].count(1) == 2  # the template's own


def test_a_tokenizer_without_an_end_adds_none() -> None:
    tokenizer = train_tokenizer()
    tokenizer.eos_token = None
    example = text(("a", False), ("b", True))
    assert (tokenizer.decode(encode(tokenizer, example)[0]), learnt(tokenizer, example)) == ("ab", "b")


def test_plain_text_is_learnt_but_for_its_first_token(tokenizer: Any) -> None:
    for form in ("answers", "text"):
        tokens, weights = encode(tokenizer, text(("a b", True)), form)
        assert tokenizer.decode(tokens) == "a b<|im_end|>"
        assert weights == [0.0] + [1.0] * (len(tokens) - 1)


def test_white_space_is_learnt_where_the_tokenizer_trims_it_from_offsets() -> None:
    """As GPT-NeoX's does: a token of nothing but spaces then has an empty span."""
    tokenizer = train_tokenizer()
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for fast in (True, False):
        encoded = Encoder(tokenizer, fast).encode([render(tokenizer, chat(*CHATS["white space"]))])
        kept = encoded.tokens[encoded.weights != 0]
        assert tokenizer.decode(kept) == "  def f():\n    return 1\n<|im_end|> <|im_end|>"
    assert learnt(tokenizer, text(("a", False), (" b  c", True))) == " b  c<|im_end|>"
