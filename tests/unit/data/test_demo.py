import hashlib
import json
from collections import Counter

import pytest

from tunesmith.data import demo
from tunesmith.data.demo import demo_answer_correct, demo_records
from tunesmith.errors import UserError

ORDER = '{"kind":"order","customer":"Maya Chen","item":"desk lamp","quantity":3,"due":"Friday"}'


def sentences(records: list[dict]) -> list[str]:
    return [record["messages"][1]["content"] for record in records]


def answers(records: list[dict]) -> list[str]:
    return [record["messages"][2]["content"] for record in records]


def test_same_arguments_give_the_same_records_and_another_seed_gives_others() -> None:
    assert demo_records("train", 90) == demo_records("train", 90, seed=0)
    assert not set(sentences(demo_records("train", 90))) & set(sentences(demo_records("train", 90, seed=1)))


def test_a_shorter_list_begins_a_longer_one() -> None:
    assert demo_records("eval", 20) == demo_records("eval", 60)[:20]


def test_records_stay_the_same_between_releases() -> None:
    """Published scores are only comparable while this holds: change the digest only together with the docs' numbers."""
    text = json.dumps([demo_records("train", 300), demo_records("eval", 300)], sort_keys=True)
    expected = "c1ace5568f1ae94dcb81317b95d064cf95b92692fe1a6b92bae9ba3c977a81f7"
    assert hashlib.sha256(text.encode()).hexdigest() == expected


@pytest.mark.parametrize("eval_seed", [0, 1])
def test_no_sentence_is_in_both_splits_or_twice_in_one(eval_seed: int) -> None:
    train, held_out = sentences(demo_records("train", 3000)), sentences(demo_records("eval", 600, seed=eval_seed))
    assert len(set(train)) == len(train) == 3000
    assert len(set(held_out)) == len(held_out) == 600
    assert not set(train) & set(held_out)


def test_records_are_chats_whose_answers_are_compact_json_with_fixed_keys() -> None:
    keys = {
        "order": ["kind", "customer", "item", "quantity", "due"],
        "appointment": ["kind", "person", "with", "day", "time"],
        "measurement": ["kind", "object", "property", "value", "unit"],
    }
    for record in demo_records("train", 600):
        assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
        answer = record["messages"][2]["content"]
        facts = json.loads(answer)
        assert list(facts) == keys[facts["kind"]]
        assert answer == json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
        assert demo_answer_correct(answer, answer)


def test_kinds_are_balanced_in_both_splits() -> None:
    for split in ("train", "eval"):
        kinds = Counter(json.loads(answer)["kind"] for answer in answers(demo_records(split, 90)))
        assert kinds == {"order": 30, "appointment": 30, "measurement": 30}


def test_every_template_is_used_and_leaves_no_gap() -> None:
    texts = sentences(demo_records("train", 3000))
    assert not [text for text in texts if "{" in text or "}" in text or "  " in text]
    for templates in (demo.ORDER_TEMPLATES, demo.APPOINTMENT_TEMPLATES, demo.MEASUREMENT_TEMPLATES):
        assert len(set(templates)) == len(templates) >= 12


def test_copied_facts_occur_in_the_sentence() -> None:
    for record in demo_records("eval", 600):
        sentence = record["messages"][1]["content"].lower()
        facts = json.loads(record["messages"][2]["content"])
        for key in ("customer", "person", "with", "day", "object"):
            assert str(facts.get(key, "")).lower() in sentence
        if "value" in facts:
            assert f" {facts['value']} " in f" {sentence}"


def test_times_of_day_are_told_in_two_ways() -> None:
    times: dict[str, list[str]] = {}
    for record in demo_records("train", 3000):
        facts = json.loads(record["messages"][2]["content"])
        if facts["kind"] == "appointment":
            times.setdefault(facts["time"], []).append(record["messages"][1]["content"])
    for words, time in {"9 am": "09:00", "12:30 pm": "12:30", "7:15 pm": "19:15", "17:40": "17:40"}.items():
        assert any(f" {words}" in text for text in times[time])
        assert all(f" {words}" not in text for other, texts in times.items() if other != time for text in texts)


@pytest.mark.parametrize(("noun", "plural"), [("desk lamp", "desk lamps"), ("battery", "batteries"), ("tray", "trays")])
def test_plurals(noun: str, plural: str) -> None:
    assert demo._plural(noun) == plural


@pytest.mark.parametrize(
    "answer",
    [
        ORDER,
        f"\n {ORDER} \n",
        '{ "due": "Friday", "quantity": 3, "item": "desk lamp", "customer": "Maya Chen", "kind": "order" }',
        ORDER.replace("Maya", "\\u004daya"),
    ],
)
def test_equal_objects_are_correct(answer: str) -> None:
    assert demo_answer_correct(answer, ORDER)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        "[" * 100_000,
        "9" * 10_000,
        ORDER[:-1],
        ORDER + ".",
        ORDER + ORDER,
        f"[{ORDER}]",
        f"```json\n{ORDER}\n```",
        ORDER.replace('"', "'"),
        ORDER.replace("3", '"3"'),
        ORDER.replace("3", "3.0"),
        ORDER.replace("3", "NaN"),
        ORDER.replace("3", "true"),
        ORDER.replace("Friday", "friday"),
        ORDER.replace("Friday", "Friday "),
        ORDER.replace("}", ',"note":null}'),
        ORDER.replace("}", ',"due":"Friday"}'),
        ORDER.replace(',"due":"Friday"', ""),
    ],
)
def test_everything_else_is_wrong(answer: str) -> None:
    assert not demo_answer_correct(answer, ORDER)


def test_whole_numbers_and_fractions_are_told_apart() -> None:
    assert demo_answer_correct('{"value":82.5}', '{"value":82.5}')
    assert demo_answer_correct('{"value":82.50}', '{"value":82.5}')
    assert not demo_answer_correct('{"value":82.0}', '{"value":82}')
    assert not demo_answer_correct('{"value":[1]}', '{"value":[true]}')


def test_unknown_split_and_negative_count_are_refused() -> None:
    with pytest.raises(UserError, match="train, eval"):
        demo_records("test", 3)
    with pytest.raises(UserError, match="0 or more"):
        demo_records("train", -1)
    assert demo_records("train", 0) == []
