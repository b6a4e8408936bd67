"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from kv_memory.config import DecodeSettings
from kv_memory.errors import UnsupportedRequestError
from kv_memory.generate import Answer, AnswerStream, Turn
from kv_memory.serve.auth import Reader
from kv_memory.serve.decode import ClientGoneError, Decoding, EventStream, unless_gone
from kv_memory.serve.errors import OPENAPI, ApiError
from kv_memory.serve.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Generation,
    Message,
    Origin,
    PromptDetails,
    ResponseFormat,
    Source,
    TextChoice,
    Usage,
)
from kv_memory.serve.service import Service
from kv_memory.serve.settings import ServeSettings
from kv_memory.serve.sources import Target

router = APIRouter(prefix="/v1", tags=["answers"], responses=OPENAPI)
_GONE = 499  # nginx's status for a client that has closed the connection; nobody receives it
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The answer."}
}


@router.post("/chat/completions", response_model=ChatCompletion, responses=_STREAM)
async def chat_completions(request: Request, body: ChatRequest, access: Reader) -> Response:
    """Answer a conversation, from documents if the model's name or `kv_memory` chooses any."""
    service: Service = request.app.state.service
    body.check()
    turns = [_turn(message) for message in body.messages]
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    settings = _settings(body, service.settings, limit=limit, json_schema=_schema(body.response_format))

    def start() -> AnswerStream:
        return Target.of(service.memory, body.model, body.kv_memory, access).start(turns, settings)

    return await _respond(request, service, body, start, "chat")


@router.post("/completions", response_model=Completion, responses=_STREAM)
async def completions(request: Request, body: CompletionRequest, access: Reader) -> Response:
    """Continue a text; with documents, answer it as a question."""
    service: Service = request.app.state.service
    body.check()
    settings = _settings(body, service.settings, limit=body.max_tokens)

    def start() -> AnswerStream:
        target = Target.of(service.memory, body.model, body.kv_memory, access)
        (text,) = body.texts
        if target.choice is None:
            return target.memory.reader.complete(text, settings=settings)
        return target.start([Turn("user", text)], settings)

    return await _respond(request, service, body, start, "text")


async def _respond(
    request: Request,
    service: Service,
    body: Generation,
    start: Callable[[], AnswerStream],
    kind: Literal["chat", "text"],
) -> Response:
    decoding = Decoding(start, service.gate, service.metrics, started_s=time.perf_counter())
    form = _Form(kind, body.model, decoding, with_usage=bool(body.stream_options and body.stream_options.include_usage))
    try:
        await unless_gone(request.receive, decoding.begin())
        if body.stream:
            return EventStream(
                decoding, on_piece=form.piece, on_end=form.end, client_timeout_s=service.settings.client_timeout_s
            )
        answer = await unless_gone(request.receive, decoding.run())
    except ClientGoneError:
        await decoding.close()
        return Response(status_code=_GONE)
    except BaseException:
        await decoding.close()
        raise
    await decoding.close()
    return Response(form.whole(answer).model_dump_json(), media_type="application/json")


def _turn(message: Message) -> Turn:
    """A message as a turn; an UnsupportedRequestError if it is about anything but text."""
    if message.role in {"tool", "function"} or message.tool_calls or message.function_call:
        raise UnsupportedRequestError(
            "tool calls are not supported",
            where="messages",
            next_step="Leave messages of tools out, and put their results into a message of the user.",
        )
    parts = [message.content] if isinstance(message.content, str) else []
    for part in message.content if isinstance(message.content, list) else ():
        if part.type != "text" or part.text is None:
            raise UnsupportedRequestError(
                f"a part of type {part.type!r}, and the model only takes text",
                where="messages",
                next_step='Send texts, or parts {"type": "text", "text": ...}.',
            )
        parts.append(part.text)
    if not parts:
        raise ApiError(400, "a message without content", code="invalid_value", param="messages")
    if message.role in {"system", "developer"}:
        return Turn("system", "\n".join(parts))
    return Turn("assistant" if message.role == "assistant" else "user", "\n".join(parts))


def _schema(form: ResponseFormat | None) -> str | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json.dumps({"type": "object"})
    if form.json_schema is None:
        raise ApiError(
            400, "the format json_schema needs a schema", code="invalid_value", param="response_format.json_schema"
        )
    return json.dumps(form.json_schema.schema_)


def _settings(
    body: Generation, limits: ServeSettings, *, limit: int | None, json_schema: str | None = None
) -> DecodeSettings:
    if limit is not None and limit > limits.max_tokens:
        raise ApiError(
            400, f"at most {limits.max_tokens:,} tokens, got {limit:,}", code="invalid_value", param="max_tokens"
        )
    stop: Sequence[str] = [body.stop] if isinstance(body.stop, str) else body.stop or ()
    return DecodeSettings(
        max_new_tokens=min(limits.default_tokens, limits.max_tokens) if limit is None else limit,
        temperature=0.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        top_k=body.top_k or 0,
        stop=tuple(each for each in stop if each),  # clients send "" for none
        seed=body.seed,
        timeout_s=limits.request_timeout_s,
        json_schema=json_schema,
    )


class _Form:
    """The form of one response: a chat or a text, whole or in chunks."""

    def __init__(self, kind: Literal["chat", "text"], model: str, decoding: Decoding, *, with_usage: bool) -> None:
        self._is_chat = kind == "chat"
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._decoding = decoding
        self._with_usage = with_usage
        self._begun = False

    def whole(self, answer: Answer) -> ChatCompletion | Completion:
        """The whole response."""
        head: dict[str, Any] = {**self._head, "usage": _usage(answer), "kv_memory": self._origin(answer)}
        if self._is_chat:
            message = AnswerMessage(content=answer.text)
            return ChatCompletion(choices=[ChatChoice(message=message, finish_reason=_reason(answer))], **head)
        return Completion(choices=[TextChoice(text=answer.text, finish_reason=_reason(answer))], **head)

    def piece(self, text: str) -> str:
        """The chunk for a piece."""
        return self._chunk(text, None)

    def end(self, answer: Answer) -> list[str]:
        """The last chunks: why the answer ends and what it was made from, then its tokens if asked for."""
        last = [self._chunk("", _reason(answer), kv_memory=self._origin(answer).model_dump())]
        if self._with_usage:
            last.append(self._dump(choices=[], usage=_usage(answer).model_dump()))
        return last

    def _chunk(self, text: str, finish_reason: str | None, **more: Any) -> str:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        if self._is_chat:
            delta = {"content": text} if text or finish_reason is None else {}
            choice["delta"] = delta if self._begun else {"role": "assistant", "content": text}
            self._begun = True
        else:
            choice["text"] = text
        if self._with_usage:
            more["usage"] = None
        return self._dump(choices=[choice], **more)

    def _dump(self, **fields: Any) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return json.dumps({**self._head, "object": kind, **fields}, ensure_ascii=False)

    def _origin(self, answer: Answer) -> Origin:
        return Origin(
            sources=[
                Source(document_id=hit.document_id, passage=hit.ordinal, score=hit.score, metadata=dict(hit.metadata))
                for hit in answer.sources
            ],
            read_from=answer.read_from,
            ttft_s=self._decoding.ttft_s,
            damaged=list(dict.fromkeys(answer.fallbacks)),
        )


def _reason(answer: Answer) -> Literal["stop", "length"]:
    return "length" if answer.finish_reason == "length" else "stop"


def _usage(answer: Answer) -> Usage:
    n_prompt = answer.n_prompt_tokens + answer.n_cached_tokens
    return Usage(
        prompt_tokens=n_prompt,
        completion_tokens=answer.n_new_tokens,
        total_tokens=n_prompt + answer.n_new_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=answer.n_cached_tokens),
    )
