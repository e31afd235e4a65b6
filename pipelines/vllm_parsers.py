"""vLLM's parsers of reasoning and tool calls behind `pipelines.answer_parsers.AnswerParser`.

The third file that imports vLLM: it runs in processes that have no engine. What is asked of the parsers is what vLLM's own
chat server asks (vllm/entrypoints/openai/chat_completion/serving.py): one parser for each answer, made for the tokenizer, the
tools and the chat template's variables, and given the whole text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pipelines import vllm_log
from pipelines.answer_parsers import GPT_OSS, Parsed
from pipelines.errors import ModelError
from pipelines.settings import ModelSettings, PromptSettings, SamplingSettings
from pipelines.tokenizer import load_tokenizer
from pipelines.vllm_defaults import set_quiet_environment
from pipelines.vllm_requests import one_line

_log = logging.getLogger(__name__)

#: They write a traceback for each malformed call, which its row shows as it is.
_NOISY = ("vllm.tool_parsers", "vllm.reasoning", "vllm.parser")
#: gpt-oss answers in messages with channels, not in marked text: vLLM has a parser of its own for them.
_HARMONY = {GPT_OSS, "openai"}


class VLLMParsers:
    """See `AnswerParser`. Raises ModelError for what vLLM does not have, or what cannot work with the model's tokenizer."""

    def __init__(
        self, model: ModelSettings, sampling: SamplingSettings, prompt: PromptSettings | None
    ) -> None:
        self._names = {
            f"sampling.{key}": name
            for key in ("reasoning_parser", "tool_call_parser")
            if (name := getattr(sampling, key)) is not None
        }
        self._model = model
        set_quiet_environment()
        vllm_log.error_log()  # which leaves stdout to the command, as for an engine
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            from vllm.tokenizers.hf import get_cached_tokenizer
        except ImportError as error:
            raise self._refusal(f"needs vLLM, which cannot be imported here: {one_line(error)}") from error

        # Each parser asks for the whole vocabulary, which transformers makes anew each time.
        self._tokenizer = get_cached_tokenizer(load_tokenizer(model))
        self._special = frozenset(self._tokenizer.all_special_ids)
        self._variables = dict(prompt.chat_template_kwargs) if prompt else {}
        reasoning, calls = sampling.reasoning_parser, sampling.tool_call_parser
        try:
            if plugin := model.engine.get("reasoning_parser_plugin"):
                _load_plugin(plugin)
            self._whole = _composed(reasoning, calls)
            self._thinking = _composed(reasoning, None) if reasoning is not None else None
            self._request = _request(sampling, prompt.tools if prompt else None, self._variables)
            adjusted = self._new(self._whole).adjust_request(self._request.model_copy())
            self.keeps_special_tokens = bool(
                sampling.skip_special_tokens and not adjusted.skip_special_tokens
            )
        except Exception as error:  # KeyError, TypeError, RuntimeError: each parser has its own
            raise self._refusal(one_line(error)) from error
        self._skips_special = sampling.skip_special_tokens and not self.keeps_special_tokens
        self._told = False

    def answer(self, text: str, token_ids: list[int]) -> str:
        if self._thinking is None:
            return text
        try:
            _, said, _ = self._new(self._thinking).parse(
                text, self._request, model_output_token_ids=token_ids
            )
        except Exception as error:  # noqa: BLE001 -- a text that vLLM's parser does not take
            self._tell(error)
            return text
        return said or ""

    def parse(self, text: str, token_ids: list[int]) -> Parsed:
        parser = self._new(self._whole)
        try:
            reasoning, said, found = parser.parse(
                text, self._request, enable_auto_tools=True, model_output_token_ids=token_ids
            )
        except Exception as error:  # noqa: BLE001 -- a text that vLLM's parser does not take
            self._tell(error)
            return Parsed(text=text)
        calls = [{"name": call.name, "arguments": call.arguments} for call in found or ()] or None
        said = said or ""
        return Parsed(
            text=said,
            reasoning=reasoning or None,
            reasoning_tokens=self._reasoning_tokens(reasoning or "", said, calls is not None, token_ids),
            tool_calls=calls,
        )

    def _new(self, parser_class: Callable[..., Any]) -> Any:
        """Parsers have state: one for each answer, as in vLLM's server."""
        return parser_class(self._tokenizer, self._request.tools, chat_template_kwargs=self._variables)

    def _reasoning_tokens(self, reasoning: str, said: str, calls: bool, token_ids: list[int]) -> int | None:
        """vLLM's own count leaves out reasoning that the prompt has opened, and is 0 for parsers that cannot count. So: where the
        parser says that the answer's tokens begin, if the texts on both sides agree.
        """
        if self._thinking is None or not reasoning or not token_ids:
            return 0
        if not said and not calls:  # it ended within its reasoning, or with it
            return len(token_ids) - (token_ids[-1] in self._special)
        try:
            rest = self._new(self._thinking).reasoning_parser.extract_content_ids(list(token_ids))
        except Exception:  # noqa: BLE001 -- not every parser has this, and not every one has the same way to say so
            return None
        end = len(token_ids) - len(rest)
        before, after = (
            self._tokenizer.decode(ids, skip_special_tokens=self._skips_special)
            for ids in (token_ids[:end], token_ids[end:])
        )
        agree = (
            rest == token_ids[end:] and reasoning.strip() in before and (not said or said.strip() in after)
        )
        return end if agree else None

    def _tell(self, error: Exception) -> None:
        """Once: it may be the same for every answer."""
        if not self._told:
            self._told = True
            _log.warning("%s does not take an answer, which stays as it is: %s", self._named, one_line(error))

    @property
    def _named(self) -> str:
        return ", ".join(f"{key}: {name}" for key, name in self._names.items())

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"{self._named} does not work for model {self._model.source!r}: {reason}")


def _composed(reasoning: str | None, calls: str | None) -> Callable[..., Any]:
    """The class of vLLM's parser that has both."""
    from vllm.parser import ParserManager

    found: Callable[..., Any] = ParserManager.get_parser(
        tool_parser_name=calls,
        reasoning_parser_name=reasoning,
        enable_auto_tools=calls is not None,
        is_harmony=bool({reasoning, calls} & _HARMONY),
    )
    return found


def _request(
    sampling: SamplingSettings, tools: list[dict[str, Any]] | None, variables: dict[str, Any]
) -> Any:
    """What parsers look at of a request: its tools, and that calls of them are to be looked for."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "-"}],
        tools=tools,
        chat_template_kwargs=variables,
        skip_special_tokens=sampling.skip_special_tokens,
    )
    if sampling.tool_call_parser is not None:
        request.tool_choice = "auto"  # also where a template of the user's own names the tools
    return request


def _load_plugin(path: str) -> None:
    from vllm.reasoning import ReasoningParserManager

    ReasoningParserManager.import_reasoning_parser(path)
