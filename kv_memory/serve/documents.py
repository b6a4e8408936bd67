"""`/v1/documents` and `/v1/jobs`: documents in and out, and the jobs that add them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from kv_memory.documents import Document
from kv_memory.documents.loaders import check_lines, parse_file
from kv_memory.errors import DocumentError, UnsupportedRequestError
from kv_memory.ingest.pipeline import AddReport
from kv_memory.jobs import Job, Ledger
from kv_memory.memory import KVMemory
from kv_memory.serve import schemas
from kv_memory.serve.auth import Access, Reader
from kv_memory.serve.errors import OPENAPI, ErrorBody, describe
from kv_memory.serve.service import Service
from kv_memory.serve.sources import collections_of, existing

router = APIRouter(prefix="/v1", tags=["documents"], responses=OPENAPI)
Collection = Annotated[str | None, Query(min_length=1, max_length=255, description="By default, the server's own.")]
_MOST_AT_ONCE_BYTES = 2**16


class NewDocument(schemas.Request):
    """A document to add. Another text under the same id replaces the document."""

    id: str = Field(min_length=1, max_length=1000)
    text: str
    metadata: dict[str, Any] = Field(default_factory=dict)


class AddRequest(schemas.Request):
    """Documents to add; `wait` adds a few short ones before the response, instead of in a job."""

    collection: schemas.Text | None = Field(default=None, max_length=255)
    documents: list[NewDocument] = Field(min_length=1)
    wait: bool = False


class JobStatus(BaseModel):
    """A job that adds documents.

    `interrupted`: no process works on it, and the next server on this folder resumes it. `failed` are documents that
    could not be added, `error` is what has stopped the job.
    """

    id: str
    object: Literal["job"] = "job"
    collection: str
    status: Literal["queued", "running", "interrupted", "done", "cancelled"]
    total: int
    done: int
    failed: int
    n_tokens: int
    created_at: datetime
    finished_at: datetime | None
    errors: list[dict[str, Any]] = Field(default_factory=list)
    error: ErrorBody | None = None


class JobList(BaseModel):
    """Jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobStatus]


class Added(BaseModel):
    """What was added before the response."""

    object: Literal["documents.added"] = "documents.added"
    collection: str
    added: list[str]
    replaced: list[str]
    unchanged: list[str]
    notes: list[str]
    n_tokens: int


class Summary(BaseModel):
    """A document without its passages."""

    id: str
    object: Literal["document"] = "document"
    metadata: dict[str, Any]
    n_passages: int
    n_tokens: int
    created_at: datetime
    updated_at: datetime


class Page(BaseModel):
    """Documents in the order of their ids; with `has_more`, `last_id` is the next request's `after`."""

    object: Literal["list"] = "list"
    data: list[Summary]
    has_more: bool
    last_id: str | None


class Passage(BaseModel):
    """A passage of a document; `text` is null if it is not kept."""

    passage: int
    n_tokens: int
    text: str | None


class Whole(Summary):
    """A document with its passages."""

    passages: list[Passage]


class Removed(BaseModel):
    """A document that was removed."""

    id: str
    object: Literal["document"] = "document"
    deleted: Literal[True] = True


_ADDED: dict[int | str, dict[str, Any]] = {202: {"model": JobStatus, "description": "A job adds the documents."}}


@router.post("/documents", response_model=Added, responses=_ADDED)
async def add_documents(request: Request, body: AddRequest, access: Reader) -> Any:
    """Add documents in a job, or with `wait` at once."""
    service: Service = request.app.state.service
    collection = body.collection or service.memory.collection
    access.check(collection, write=True)
    documents = await asyncio.to_thread(_checked, body.documents)
    return await _add(service, collection, documents, wait=body.wait)


@router.post("/documents/files", response_model=Added, responses=_ADDED)
async def add_files(
    request: Request,
    access: Reader,
    files: Annotated[list[UploadFile], File(description="Text, Markdown, reStructuredText, HTML or PDF.")],
    collection: Annotated[str | None, Form(min_length=1, max_length=255)] = None,
    encoding: Annotated[str, Form(max_length=40)] = "utf-8",
    wait: Annotated[bool, Form()] = False,
) -> Any:
    """Add files; the id of each is its name. They are parsed from the request, and nothing is opened by name."""
    service: Service = request.app.state.service
    collection = collection or service.memory.collection
    access.check(collection, write=True)
    documents = []
    for file in files:
        raw = await file.read()
        documents.append(await asyncio.to_thread(parse_file, raw, name=file.filename or "file", encoding=encoding))
    return await _add(service, collection, documents, wait=wait)


@router.get("/documents", response_model=Page)
def list_documents(
    request: Request,
    access: Reader,
    collection: Collection = None,
    after: Annotated[str | None, Query(description="`last_id` of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page:
    """List documents, page by page."""
    memory = _memory(request, collection, access)
    found = memory.store.documents(after=after, limit=limit + 1)
    data = [
        Summary(
            id=each.id,
            metadata=each.metadata,
            n_passages=each.n_passages,
            n_tokens=each.n_tokens,
            created_at=each.created_at,
            updated_at=each.updated_at,
        )
        for each in found[:limit]
    ]
    return Page(data=data, has_more=len(found) > limit, last_id=data[-1].id if data else None)


@router.get("/documents/{document_id:path}", response_model=Whole)
def show_document(request: Request, access: Reader, document_id: str, collection: Collection = None) -> Whole:
    """Show a document with its passages."""
    found = _memory(request, collection, access).document(document_id)
    assert found.created_at is not None and found.updated_at is not None
    return Whole(
        id=found.id,
        metadata=found.metadata,
        n_passages=len(found.passages),
        n_tokens=found.n_tokens,
        created_at=found.created_at,
        updated_at=found.updated_at,
        passages=[
            Passage(passage=ordinal, n_tokens=each.n_tokens, text=each.text)
            for ordinal, each in enumerate(found.passages)
        ],
    )


@router.delete("/documents/{document_id:path}", response_model=Removed)
def remove_document(request: Request, access: Reader, document_id: str, collection: Collection = None) -> Removed:
    """Remove a document with its caches."""
    _memory(request, collection, access, write=True).remove(document_id)
    return Removed(id=document_id)


@router.get("/jobs", response_model=JobList)
def list_jobs(
    request: Request, access: Reader, collection: Collection = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> JobList:
    """List the jobs of a collection, or of all."""
    service: Service = request.app.state.service
    names = [collection] if collection is not None else collections_of(service.memory, access)
    stores = [_memory(request, name, access).store for name in names]
    jobs = [(store, job) for store in stores for job in Ledger(store).jobs()]
    jobs.sort(key=lambda pair: pair[1].id, reverse=True)
    return JobList(data=[_status(service, Ledger(store), job) for store, job in jobs[:limit]])


@router.get("/jobs/{job_id}", response_model=JobStatus)
def show_job(request: Request, access: Reader, job_id: str) -> JobStatus:
    """Show the progress of a job."""
    service: Service = request.app.state.service
    ledger = _ledger(request, access, job_id)
    return _status(service, ledger, ledger.job(job_id))


@router.post("/jobs/{job_id}/cancel", response_model=JobStatus)
def cancel_job(request: Request, access: Reader, job_id: str) -> JobStatus:
    """Cancel a job; the document in progress is still added."""
    service: Service = request.app.state.service
    ledger = _ledger(request, access, job_id, write=True)
    ledger.cancel(ledger.job(job_id))
    return _status(service, ledger, ledger.job(job_id))


def _memory(request: Request, collection: str | None, access: Access, *, write: bool = False) -> KVMemory:
    service: Service = request.app.state.service
    name = collection or service.memory.collection
    access.check(name, write=write)
    return existing(service.memory, name)


def _ledger(request: Request, access: Access, job_id: str, *, write: bool = False) -> Ledger:
    service: Service = request.app.state.service
    return Ledger(_memory(request, service.jobs.collection_of(job_id), access, write=write).store)


def _checked(given: Sequence[NewDocument]) -> list[Document]:
    """The documents of a request; whatever is wrong with one is said at once, not in the job."""
    documents: dict[str, Document] = {}
    for each in given:
        document = Document(id=each.id, text=each.text, metadata=each.metadata)
        check_lines(document.text, where=document.id)
        if documents.setdefault(document.id, document).text != document.text:
            raise DocumentError(
                "this id was given twice, with different texts",
                where=document.id,
                next_step="Give each text its own id, or leave out the outdated one.",
            )
    return list(documents.values())


async def _add(service: Service, collection: str, documents: Sequence[Document], *, wait: bool) -> Any:
    memory = await asyncio.to_thread(service.memory.in_collection, collection)
    if not wait:
        job = await asyncio.to_thread(service.jobs.submit, memory, documents)
        status = await asyncio.to_thread(_status, service, Ledger(memory.store), job)
        location = {"Location": f"/v1/jobs/{job.name}"}
        return JSONResponse(status.model_dump(mode="json"), status_code=202, headers=location)
    size_bytes = sum(len(document.text.encode()) for document in documents)
    if size_bytes > _MOST_AT_ONCE_BYTES:
        raise UnsupportedRequestError(
            f"at most {_MOST_AT_ONCE_BYTES:,} bytes of text can be waited for, got {size_bytes:,}",
            where="wait",
            next_step="Leave 'wait' out; the response then names a job.",
        )
    service.gate.enter()
    try:
        report: AddReport = await asyncio.to_thread(memory.add, documents)
    finally:
        service.gate.leave()
    names = ("added", "replaced", "unchanged", "notes", "n_tokens")
    return Added(collection=collection, **{name: getattr(report, name) for name in names})


def _status(service: Service, ledger: Ledger, job: Job) -> JobStatus:
    counts, error = ledger.counts(job), service.jobs.error(job.name)
    status = job.state
    return JobStatus(
        id=job.name,
        collection=job.collection,
        status="queued" if status == "interrupted" and error is None and service.jobs.waits(job.name) else status,
        total=counts.total,
        done=counts.done,
        failed=counts.failed,
        n_tokens=counts.n_tokens,
        created_at=job.created_at,
        finished_at=job.finished_at,
        errors=[{"document_id": each.document_id, **each.error} for each in ledger.failed(job, limit=20)],
        error=None if error is None or status != "interrupted" else describe(error)[1],
    )
