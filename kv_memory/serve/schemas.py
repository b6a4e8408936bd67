"""Requests and responses of OpenAI's API, as far as they make sense here, with the field `kv_memory` added.

Fields of OpenAI that change nothing here are accepted; those that cannot be fulfilled are refused, not ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kv_memory.errors import UnsupportedRequestError

Text = Annotated[str, Field(min_length=1)]
_SEED = 2**63


class Request(BaseModel):
    """A request: types are not converted, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Choice(Request):
    """The documents to answer from.

    Passages are retrieved by the last question, from the collection or from the documents named. Documents named
    without `top_k` are used whole.
    """

    collection: Text | None = None
    document_ids: list[Text] | None = Field(default=None, min_length=1, max_length=1000)
    top_k: int | None = Field(default=None, ge=1, le=100)
    filter: dict[str, Any] | None = None
    min_score: float | None = None
    read_from: Literal["caches", "text"] = "caches"


class StreamOptions(BaseModel):
    """Options of a stream; those of OpenAI that change nothing here are ignored."""

    include_usage: bool | None = None


class Generation(Request):
    """Fields that chat and text completions share."""

    model: Text
    kv_memory: Choice | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, description="Not OpenAI's, but that of most other servers.")
    seed: int | None = Field(default=None, ge=-_SEED, lt=_SEED)
    stop: str | list[str] | None = Field(default=None, max_length=16)
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    def unsupported(self) -> dict[str, bool]:
        """Whether the request asks for what cannot be fulfilled, by the name of the field."""
        return {
            "n": self.n not in {None, 1},
            "frequency_penalty": bool(self.frequency_penalty),
            "presence_penalty": bool(self.presence_penalty),
            "logit_bias": bool(self.logit_bias),
        }

    def check(self) -> None:
        """Refuse what cannot be fulfilled.

        Raises:
            UnsupportedRequestError: The request asks for it.
        """
        for name, asked in self.unsupported().items():
            if asked:
                raise UnsupportedRequestError(
                    f"{name!r} is not supported", where=name, next_step=_ADVICE.get(name, f"Leave {name!r} out.")
                )


_ADVICE = {
    "n": "Send one request per answer: those that arrive together are decoded together.",
    "tools": "Leave 'tools' out; the model answers in words, or by `response_format`.",
}


class ContentPart(BaseModel):
    """A part of a message; only text can be used."""

    model_config = ConfigDict(strict=True)
    type: str
    text: str | None = None


class Message(BaseModel):
    """A message of a conversation; fields of replies that clients send back, such as `refusal`, are ignored."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None


class JsonSchema(BaseModel):
    """A schema for the answer."""

    model_config = ConfigDict(strict=True)
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Generation):
    """A request for the next message of a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    # These change nothing here.
    metadata: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: str | None = None

    def unsupported(self) -> dict[str, bool]:
        """See `Generation.unsupported`."""
        return super().unsupported() | {
            "logprobs": bool(self.logprobs),
            "top_logprobs": bool(self.top_logprobs),
            "tools": bool(self.tools),
            "tool_choice": self.tool_choice not in {None, "none", "auto"} if _is_name(self.tool_choice) else True,
            "functions": bool(self.functions),
            "function_call": self.function_call not in {None, "none", "auto"} if _is_name(self.function_call) else True,
            "modalities": self.modalities not in (None, ["text"]),
            "audio": self.audio is not None,
            "web_search_options": self.web_search_options is not None,
        }


def _is_name(value: object) -> bool:
    return value is None or isinstance(value, str)


class CompletionRequest(Generation):
    """A request to continue a text. Documents, if any are chosen, are asked with the text as the question."""

    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    def unsupported(self) -> dict[str, bool]:
        """See `Generation.unsupported`."""
        return super().unsupported() | {
            "prompt": not self.texts or len(self.texts) > 1,
            "best_of": self.best_of not in {None, 1},
            "echo": bool(self.echo),
            "logprobs": bool(self.logprobs),
            "suffix": bool(self.suffix),
        }

    @property
    def texts(self) -> list[str]:
        """The prompts; empty if they are given as tokens."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [each for each in given if isinstance(each, str)]


_ADVICE["prompt"] = "Send one prompt a request, as text."


class EmbeddingRequest(Request):
    """A request for embeddings."""

    model: Text
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None


class Source(BaseModel):
    """A passage that was answered from."""

    document_id: str
    passage: int
    score: float
    metadata: dict[str, Any]


class Origin(BaseModel):
    """What an answer was made from.

    `ttft_s` counts the time in the queue. `damaged` names documents whose cache was damaged, so that the text was used.
    """

    sources: list[Source]
    read_from: Literal["caches", "text"]
    ttft_s: float
    damaged: list[str]


class PromptDetails(BaseModel):
    """Details of the tokens of the prompt."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of an answer; cached ones, the entries of caches that stood for documents, count as prompt too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AnswerMessage(BaseModel):
    """The message that answers."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The only choice of a chat completion."""

    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """An answer to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    kv_memory: Origin


class TextChoice(BaseModel):
    """The only choice of a text completion."""

    index: int = 0
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class Completion(BaseModel):
    """The continuation of a text."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    kv_memory: Origin


class Model(BaseModel):
    """A model, alone or with a collection that it answers from."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "kv-memory"


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Embedding(BaseModel):
    """An embedding, as numbers or as base64 of float32 in little-endian order."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens are not counted for embeddings."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingList(BaseModel):
    """All embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
