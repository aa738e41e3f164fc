"""Examples to tokens and loss weights, with the tokenizer's own chat template.

Which tokens are learnt is found on the rendered text itself: from the template's `{% generation %}` marks where it has
them, else from rendering prefixes of the conversation. A template for which neither is sound is refused, with the
first difference shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.errors import UserError
from tunesmith.types import Example, Message, Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """Token ids of one example and the loss weight of predicting each."""

    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Renderer:
    """Renders examples for one tokenizer. `learn_all`: loss on every token (pretrain), not only on answers (sft)."""

    tokenizer: PreTrainedTokenizerBase
    learn_all: bool

    def render(self, example: Example) -> Rendered:
        """Tokens and weights. Raises UserError if the template cannot render it or nothing is there to learn."""
        rendered = self._conversation(example) if example.messages else self._plain_text(example)
        weights = [1.0] * len(rendered.tokens) if self.learn_all else rendered.weights
        if weights:
            weights[0] = 0.0  # nothing stands before the first token to predict it from
        if not any(weights):
            raise UserError(
                f"{example.place}: nothing to learn from: no answer in it; "
                "give an assistant turn or completion that is not empty, or remove the record"
            )
        return Rendered(rendered.tokens, weights)

    def _plain_text(self, example: Example) -> Rendered:
        text, spans = "", []
        for piece in example.pieces:
            if piece.learn and piece.text:
                spans.append((len(text), len(text) + len(piece.text)))
            text += piece.text
        tokens, weights = self._tokenize(text, spans, add_special_tokens=True, place=example.place)
        eos = self.tokenizer.eos_token_id
        if eos is not None and spans:
            if tokens[-1:] != [eos]:
                tokens, weights = [*tokens, eos], [*weights, 1.0]
            weights[-1] = 1.0
        return Rendered(tokens, weights)

    def _conversation(self, example: Example) -> Rendered:
        messages = [{"role": message.role, "content": message.content} for message in example.messages]
        if GENERATION_MARK.search(self._template(example.place)):
            return self._marked_by_template(messages, example.place)
        text = self.chat_text(messages, example.place)
        spans = [] if self.learn_all else self._answer_spans(example.messages, messages, text, example.place)
        return Rendered(*self._tokenize(text, spans, False, example.place))

    def chat_text(self, messages: list[dict[str, str]], place: Place, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, up to where the assistant's next answer begins."""
        from jinja2 import TemplateError

        self._template(place)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"{place}: the model's chat template refuses this conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def _template(self, place: Place) -> str:
        template = self.tokenizer.chat_template
        if not template:
            raise UserError(
                f"{place}: a conversation, but the model's tokenizer has no chat template; "
                "set model.chat_template to a Jinja file or to chatml, or use an instruction-tuned model"
            )
        return template if isinstance(template, str) else str(template)

    def _marked_by_template(self, messages: list[dict[str, str]], place: Place) -> Rendered:
        self.chat_text(messages, place)  # a template's refusal is reported by it
        encoded: Any = self.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        return Rendered(list(encoded["input_ids"]), [float(flag) for flag in encoded["assistant_masks"]])

    def _answer_spans(
        self, turns: tuple[Message, ...], messages: list[dict[str, str]], text: str, place: Place
    ) -> list[Span]:
        """Character spans of the assistant's answers, end-of-turn token included, in the whole rendered text."""
        spans = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant" or not turn.content:
                continue
            before = self.chat_text(messages[:index], place, prompt=True)
            after = self.chat_text(messages[: index + 1], place)
            for prefix in (before, after):
                if not text.startswith(prefix):
                    raise UserError(_unstable(prefix, text, index, place))
            spans.append((len(before), self._end_of_turn(text, len(before), len(after))))
        return spans

    def _end_of_turn(self, text: str, start: int, stop: int) -> int:
        """Without the white space that some templates put behind the end-of-turn token: generation stops before it."""
        stripped = text[start:stop].rstrip()
        ends_with_token = any(
            token.special and stripped.endswith(token.content) for token in self.tokenizer.added_tokens_decoder.values()
        )
        return start + len(stripped) if ends_with_token else stop

    def _tokenize(
        self, text: str, spans: list[Span], add_special_tokens: bool, place: Place
    ) -> tuple[list[int], list[float]]:
        if not self.tokenizer.is_fast:
            raise UserError(f"{self.tokenizer.name_or_path}: needs a fast tokenizer (tokenizer.json) to place the loss")
        try:
            encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError(f"{place}: text that is no Unicode (half a surrogate pair); remove it") from error
        weights, span = [0.0] * len(encoded["input_ids"]), 0
        for index, (start, stop) in enumerate(encoded["offset_mapping"]):
            while span < len(spans) and stop > spans[span][1]:
                span += 1
            weights[index] = float(span < len(spans) and start >= spans[span][0] and stop > spans[span][0])
        return list(encoded["input_ids"]), weights


def _unstable(prefix: str, text: str, index: int, place: Place) -> str:
    same = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text)))
    start = max(0, same - 20)
    return (
        f"{place}: message {index + 1}: the model's chat template renders the beginning of a conversation otherwise than "
        f"the same turns inside it, so the loss cannot be placed: {prefix[start : same + 20]!r} became "
        f"{text[start : same + 20]!r}; use single-turn records, or a template with {{% generation %}} marks"
    )
