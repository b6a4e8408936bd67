"""The exception tree. Every error says what happened, where, and the next step.

```
KVMemoryError
├── ConfigError                  a setting outside its range (also a ValueError)
│   └── BudgetError              fewer tokens or bytes than the smallest cache has; names what works
├── ModelError
│   ├── ModelNotFoundError       no such hub id, folder or built-in weights
│   ├── UnsupportedModelError    an architecture whose caches we cannot make
│   ├── TokenizerError           a model without a usable tokenizer
│   └── ContextWindowError       more positions than the model can address
├── AdapterError                 an adapter folder that is missing or malformed
│   └── AdapterMismatchError     an adapter trained on other weights
├── DocumentError
│   ├── EmptyDocumentError       nothing but white space
│   ├── UnreadableDocumentError  a path that is missing, forbidden or of an unknown type
│   ├── BinaryDocumentError      bytes that are no text (NUL bytes, an image, an archive)
│   ├── EncodingError            text that is not valid in the stated encoding
│   ├── LineTooLongError         a line so long that it must be data, not prose
│   ├── DuplicateDocumentError   one id, two texts, in one call
│   ├── DocumentNotFoundError    an id that the collection does not hold (also a KeyError)
│   └── TextNotKeptError         a text is wanted that was not kept when its document was added
├── CacheError
│   ├── CacheNotFoundError       no distilled cache for this text and setting (also a KeyError)
│   ├── CorruptCacheError        bytes that are not what was written; quarantined, never decoded
│   └── FingerprintMismatchError a cache made by another model, adapter, prompt or format
├── DecodeTimeoutError           an answer that took longer than it was given (also a TimeoutError)
├── UnsupportedRequestError      something asked of a model that it cannot do: tool calls, images
├── DatasetError                 a training or evaluation set that is missing or unreadable
│   └── BrokenLineError          a line that is no example; named by number
├── TrainingError
│   ├── DivergedError            a loss or gradient that is not finite; the last good checkpoint is kept
│   └── CheckpointError          a checkpoint that is unreadable, or was made with other settings
├── JobError                     a job that cannot be run, e.g. because somebody else runs it
│   ├── JobNotFoundError         a name that no job of the store has (also a KeyError)
│   └── WorkerDiedError          a worker that was killed, or died, on a document or before its first
└── StoreError
    ├── StoreVersionError        a store written by a newer version
    ├── StorePermissionError     a folder we may not write to
    ├── StoreFullError           no space left; what was there before is untouched
    ├── StoreLockedError         another process holds the catalog for too long
    ├── StoreConnectionError     a database or object store that does not answer, or broke off
    └── TransferError            an archive that is damaged or not complete, or does not fit the collection
```
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "AdapterMismatchError",
    "BinaryDocumentError",
    "BrokenLineError",
    "BudgetError",
    "CacheError",
    "CacheNotFoundError",
    "CheckpointError",
    "ConfigError",
    "ContextWindowError",
    "CorruptCacheError",
    "DatasetError",
    "DecodeTimeoutError",
    "DivergedError",
    "DocumentError",
    "DocumentNotFoundError",
    "DuplicateDocumentError",
    "EmptyDocumentError",
    "EncodingError",
    "FingerprintMismatchError",
    "JobError",
    "JobNotFoundError",
    "KVMemoryError",
    "LineTooLongError",
    "ModelError",
    "ModelNotFoundError",
    "StoreConnectionError",
    "StoreError",
    "StoreFullError",
    "StoreLockedError",
    "StorePermissionError",
    "StoreVersionError",
    "TextNotKeptError",
    "TokenizerError",
    "TrainingError",
    "TransferError",
    "UnreadableDocumentError",
    "UnsupportedModelError",
    "UnsupportedRequestError",
    "WorkerDiedError",
]


class KVMemoryError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: What happened, one sentence without a final full stop.
        where: The file, document id, setting or table it happened at.
        next_step: What the user can do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: str | None = None, next_step: str | None = None) -> None:
        self.what = what
        self.where = where
        self.next_step = next_step
        message = what if where is None else f"{what} [{where}]"
        super().__init__(message if next_step is None else f"{message}. {next_step}")

    def __str__(self) -> str:
        # KeyError, a base of two subclasses, prints the repr of its argument.
        return str(self.args[0])

    def to_dict(self) -> dict[str, str | None]:
        """The error for machines: `error`, `what`, `where`, `next_step`."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "next_step": self.next_step,
        }


class ConfigError(KVMemoryError, ValueError):
    """A setting is outside its range or contradicts another one."""


class BudgetError(ConfigError):
    """A budget of tokens or bytes is smaller than the smallest cache of a document."""


class ModelError(KVMemoryError):
    """Something about the language model."""


class ModelNotFoundError(ModelError):
    """No model under this hub id or folder, or a built-in model is not prepared."""


class UnsupportedModelError(ModelError):
    """The architecture is not one of those whose caches can be made and moved."""


class TokenizerError(ModelError):
    """The model has no usable tokenizer."""


class ContextWindowError(ModelError):
    """More positions are asked for than the model can address."""


class AdapterError(KVMemoryError):
    """An adapter folder is missing, incomplete or malformed."""


class AdapterMismatchError(AdapterError):
    """The adapter was trained on other weights than the model that is loaded."""


class DocumentError(KVMemoryError):
    """Something about an input document."""


class EmptyDocumentError(DocumentError):
    """The document holds nothing but white space."""


class UnreadableDocumentError(DocumentError):
    """The path is missing, may not be read, or is of a type that has no reader."""


class BinaryDocumentError(DocumentError):
    """The bytes are no text."""


class EncodingError(DocumentError):
    """The bytes are not valid in the stated encoding."""


class LineTooLongError(DocumentError):
    """A line is so long that it must be data, not prose."""


class DuplicateDocumentError(DocumentError):
    """One id was given twice with different texts in one call."""


class DocumentNotFoundError(DocumentError, KeyError):
    """The collection holds no document of this id."""


class TextNotKeptError(DocumentError):
    """A text is wanted of a document that was added without keeping it."""


class CacheError(KVMemoryError):
    """Something about a distilled cache."""


class CacheNotFoundError(CacheError, KeyError):
    """There is no distilled cache for this text under these settings."""


class CorruptCacheError(CacheError):
    """The bytes are not those that were written. The blob is quarantined, never decoded."""


class FingerprintMismatchError(CacheError):
    """The cache was made by another model, adapter, prompt or format."""


class DecodeTimeoutError(KVMemoryError, TimeoutError):
    """Decoding took longer than `DecodeSettings.timeout_s`."""


class UnsupportedRequestError(KVMemoryError):
    """A model is asked for something it cannot do, e.g. to call tools or to look at an image."""


class DatasetError(KVMemoryError):
    """A training or evaluation set is missing or cannot be read."""


class BrokenLineError(DatasetError):
    """A line of a file is no example: no JSON, a field missing, a context or an answer that is empty."""


class TrainingError(KVMemoryError):
    """Something about training."""


class DivergedError(TrainingError):
    """A loss or a gradient is not finite. The last good checkpoint is kept."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be read, or was made with other settings."""


class JobError(KVMemoryError):
    """A job cannot be run as it was asked for."""


class JobNotFoundError(JobError, KeyError):
    """The store has no job of this name."""


class WorkerDiedError(JobError):
    """A worker process was killed or died, on a document or before its first."""


class StoreError(KVMemoryError):
    """Something about the store's folder or database."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of this package."""


class StorePermissionError(StoreError):
    """The store's folder may not be read or written."""


class StoreFullError(StoreError):
    """No space is left on the device. What was there before is untouched."""


class StoreLockedError(StoreError):
    """Another process holds the catalog for longer than we wait."""


class StoreConnectionError(StoreError):
    """The database or the object store does not answer, or the connection broke off. Nothing was lost."""


class TransferError(StoreError):
    """An archive of a collection is damaged, not complete or of a newer format, or does not fit the collection."""


def interruption_behind(error: BaseException) -> BaseException | None:
    """The interruption (KeyboardInterrupt, SystemExit, a worker told to stop) during which an error came up, if any.

    A library that is interrupted between two of its lines may trip over its own state while it cleans up, and what it
    then raises hides why. SQLAlchemy's transactions do, with a bare AssertionError.
    """
    behind = error.__cause__ or error.__context__
    while behind is not None:
        if not isinstance(behind, Exception | GeneratorExit):
            return behind
        behind = behind.__cause__ or behind.__context__
    return None
