"""A question with an answer that a verifier checks: GSM8K's {"question", "answer"}, MATH's {"problem", "solution", "answer"}.

The solution, or else the whole answer, is what supervised fine-tuning learns; the answer that is compared is what stands
after "#### ", or else the whole answer. A prompt alone is a prompt to generate from.
"""

from __future__ import annotations

from tunesmith.data.formats.base import Format, Record, final_answer, first_key, word_of
from tunesmith.data.formats.turns import conversation, read_prompt, with_answer
from tunesmith.types import Example, Place

QUESTIONS = ("question", "prompt", "problem")
REPLIES = ("response", "responses", "output", "outputs", "completions", "reply", "target", "text", "solution")
"""A prompt beside one of these is no prompt alone: the learnt text has another name than we know."""


class PromptAnswer(Format):
    keys = "question, answer (and solution), or prompt alone"

    @classmethod
    def matches(cls, record: Record) -> bool:
        if first_key(record, QUESTIONS) is None:
            return False
        return "answer" in record or ("prompt" in record and first_key(record, REPLIES) is None)

    def read(self, record: Record, place: Place) -> Example:
        key = first_key(record, QUESTIONS)
        assert key is not None, "read a record that does not fit"
        messages = read_prompt(record[key], record, place, (key,))
        if record.get("answer") is None:
            return conversation(messages, record, place, (key,))
        answer = word_of(record["answer"], place, ("answer",))
        if record.get("solution"):
            messages = with_answer(messages, record["solution"], record, place, ("solution",))
        else:
            messages = with_answer(messages, answer, record, place, ("answer",))
        return conversation(messages, record, place, (key,), answer=final_answer(answer))
