"""The exception tree. Every error contains a description, the place, and the next step.

```
KVMemoryError
├── ConfigError                  a setting out of range, e.g. a budget below the smallest cache (also a ValueError)
├── ModelError
│   ├── ModelNotFoundError       no such hub id, folder or built-in weights
│   ├── UnsupportedModelError    an architecture that cannot be compressed, or no usable tokenizer
│   └── ContextWindowError       more positions than the model can address
├── AdapterError                 an adapter folder that is missing or malformed, or trained on other weights
├── DocumentError                also two texts under one id in one call
│   ├── EmptyDocumentError       nothing but white space
│   ├── UnreadableDocumentError  a path that cannot be opened, or bytes that are not text in the stated encoding
│   ├── DocumentNotFoundError    an id that the collection does not hold (also a KeyError)
│   └── TextNotKeptError         a text is needed that was not kept when its document was added
├── CacheError
│   ├── CacheNotFoundError       no distilled cache for this text and setting (also a KeyError)
│   ├── CorruptCacheError        bytes that differ from those written; quarantined, never decoded
│   └── FingerprintMismatchError a cache made by another model, adapter, prompt or format
├── EncoderError                 an encoder that is not given or fails, or passages without a vector of it
├── DecodeTimeoutError           an answer that exceeded its time limit (also a TimeoutError)
├── DecodeFailedError            an answer that was being decoded together with others when that failed
├── QueueFullError               more requests than the queue in front of the model admits
├── UnsupportedRequestError      a request that a model cannot fulfil: tool calls, images
├── DatasetError                 a training or evaluation set that is missing or unreadable
│   └── BrokenLineError          a line that is not a valid example; named by number
├── TrainingError                a loss that is not finite, or a checkpoint that cannot be resumed
├── JobError                     a job that cannot run, e.g. because another process runs it, or is not in the store
│   └── WorkerDiedError          a worker that was killed, or died, on a document or before its first
└── StoreError                   also a folder without permission, or a store written by a newer version
    ├── StoreFullError           no space left; the previous content is untouched
    ├── StoreLockedError         another process locks the catalog for too long
    ├── StoreConnectionError     a database or object store that does not answer, or disconnected
    └── TransferError            an archive that is damaged, incomplete, too new, or does not fit the collection
```
"""

from __future__ import annotations


class KVMemoryError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: Description of the error: one sentence without a final full stop.
        where: File, document id, setting or table where it happened.
        next_step: Advice to the user, as an instruction.
    """

    def __init__(self, what: str, *, where: str | None = None, next_step: str | None = None) -> None:
        self.what = what
        self.where = where
        self.next_step = next_step
        message = what if where is None else f"{what} [{where}]"
        super().__init__(message if next_step is None else f"{message}. {next_step}")

    def __str__(self) -> str:
        # KeyError, a base of three subclasses, prints the repr of its argument.
        return str(self.args[0])

    def to_dict(self) -> dict[str, str | None]:
        """The error as a machine-readable dict: `error`, `what`, `where`, `next_step`."""
        return {"error": type(self).__name__, "what": self.what, "where": self.where, "next_step": self.next_step}


class ConfigError(KVMemoryError, ValueError):
    """A setting is outside its range or contradicts another one; also a budget that is too small for any cache."""


class ModelError(KVMemoryError):
    """Base of the errors of the language model."""


class ModelNotFoundError(ModelError):
    """There is no model under this hub id or folder, or a built-in model is not prepared."""


class UnsupportedModelError(ModelError):
    """The architecture is not one whose caches can be compressed and repositioned, or the tokenizer is unusable."""


class ContextWindowError(ModelError):
    """The request needs more positions than the model can address."""


class AdapterError(KVMemoryError):
    """An adapter folder is missing, incomplete or malformed, or was trained on other weights than the loaded model."""


class DocumentError(KVMemoryError):
    """Base of the errors of input documents; also one id with two different texts in one call."""


class EmptyDocumentError(DocumentError):
    """The document holds nothing but white space."""


class UnreadableDocumentError(DocumentError):
    """The path is missing, forbidden or of an unknown type, or its bytes are not text in the stated encoding."""


class DocumentNotFoundError(DocumentError, KeyError):
    """The collection has no document with this id."""


class TextNotKeptError(DocumentError):
    """A needed text was not kept when its document was added."""


class CacheError(KVMemoryError):
    """Base of the errors of distilled caches."""


class CacheNotFoundError(CacheError, KeyError):
    """There is no distilled cache for this text under these settings."""


class CorruptCacheError(CacheError):
    """The bytes differ from those written. The blob is quarantined, never decoded."""


class FingerprintMismatchError(CacheError):
    """The cache was made by another model, adapter, prompt or format."""


class EncoderError(KVMemoryError):
    """The encoder of the retriever is not given or fails, or passages have no vector of it."""


class DecodeTimeoutError(KVMemoryError, TimeoutError):
    """Decoding took longer than `DecodeSettings.timeout_s`."""


class DecodeFailedError(KVMemoryError):
    """The forward pass in which this answer was decoded together with others failed, or was interrupted."""


class QueueFullError(KVMemoryError):
    """More requests wait for the model than its queue admits. The request was not started."""


class UnsupportedRequestError(KVMemoryError):
    """The model cannot fulfil the request, e.g. call tools or look at an image."""


class DatasetError(KVMemoryError):
    """A training or evaluation set is missing or cannot be read."""


class BrokenLineError(DatasetError):
    """A line of a file is not a valid example: not JSON, or with a missing field, or an empty context or answer."""


class TrainingError(KVMemoryError):
    """A loss or gradient is not finite (the last good checkpoint is kept), or a checkpoint cannot be resumed."""


class JobError(KVMemoryError):
    """A job cannot be run as requested, or the store has no job with this name."""


class WorkerDiedError(JobError):
    """A worker process was killed or died, on a document or before its first."""


class StoreError(KVMemoryError):
    """Base of the errors of the store's folder or database: no permission, or written by a newer version."""


class StoreFullError(StoreError):
    """No space is left on the device. The previous content is untouched."""


class StoreLockedError(StoreError):
    """Another process holds the lock on the catalog for longer than the time limit."""


class StoreConnectionError(StoreError):
    """The database or the object store does not answer, or the connection was lost. No data was lost."""


class TransferError(StoreError):
    """An archive of a collection is damaged, incomplete or of a newer format, or does not fit the collection."""


def interruption_behind(error: BaseException) -> BaseException | None:
    """The interruption (KeyboardInterrupt, SystemExit, a stopped worker) during which an error occurred, if any.

    A library that is interrupted halfway through an operation may fail during cleanup, and its own error then hides
    the cause. SQLAlchemy's transactions do so, with a bare AssertionError.
    """
    behind = error.__cause__ or error.__context__
    while behind is not None:
        if not isinstance(behind, Exception | GeneratorExit):
            return behind
        behind = behind.__cause__ or behind.__context__
    return None
