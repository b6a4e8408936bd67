"""Converts LlamaIndex's nodes to references: the key of a node is the hash of its text, never its id.

Node ids are random in each run unless a parser is configured otherwise, so every ingestion would orphan caches keyed by
them. The text is exactly the text that a prompt would contain, including metadata according to the `MetadataMode`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, NodeRelationship, NodeWithScore, RelatedNodeInfo

from kv_memory import KVMemory, Reference
from kv_memory.query import key_of

from ..references import KV_ID, OnMissing, is_blank, mark_of, reference_to

_locks: weakref.WeakKeyDictionary[KVMemory, threading.Lock] = weakref.WeakKeyDictionary()
# In the metadata of the document in the store:
_NODES = "nodes"  # {node_id: [keys of its texts]}
_SOURCE_HASH = "source_hash"  # LlamaIndex's hash of the document that its nodes were made from; None if unknown


def document_of(node: BaseNode) -> str:
    """Id of the document in the store that a node belongs to: its source document's id, or its own."""
    return node.ref_doc_id or node.node_id


def text_of(node: BaseNode, mode: MetadataMode) -> str:
    """The text of a node as a prompt would contain it; empty for an image without text."""
    return "" if isinstance(node, ImageNode) and not node.text else node.get_content(metadata_mode=mode)


def node_reference(memory: KVMemory, node: BaseNode, *, on_missing: OnMissing, mode: MetadataMode) -> Reference | None:
    """The reference to a node's cache; see `reference_to` for a node without one."""
    if (mark := node.metadata.get(KV_ID)) and is_blank(node.get_content(metadata_mode=MetadataMode.NONE)):
        # A passage without a stored text. Metadata alone does not count as a node's text.
        return reference_to(memory, "", on_missing=on_missing, document_id=document_of(node), mark=str(mark))
    text = text_of(node, mode)
    if on_missing == "compress" and not is_blank(text) and not memory.reader.has(text):
        # Not in `reference_to`, so that deleting the node deletes its cache. A postprocessor may have changed the text,
        # and both will be requested.
        document_id = document_of(node)
        source_hash = source_hashes([node]).get(document_id)
        put_texts(memory, document_id, {node.node_id: text}, source_hash=source_hash, beside=True)
    return reference_to(memory, text, on_missing=on_missing, document_id=document_of(node))


def references_to(
    memory: KVMemory, nodes: Iterable[NodeWithScore], *, on_missing: OnMissing, mode: MetadataMode
) -> list[Reference]:
    """References to the caches of retrieved nodes, in their order, each once; nodes that are left out have none."""
    found = (node_reference(memory, item.node, on_missing=on_missing, mode=mode) for item in nodes)
    return list({reference.key: reference for reference in found if reference is not None}.values())


def marked(item: NodeWithScore, reference: Reference | None) -> NodeWithScore:
    """A copy of a retrieved node with its cache named in the metadata; texts made from the node exclude the mark."""
    if reference is None or reference.text is not None:
        return item
    node = item.node.model_copy()
    node.metadata = {**node.metadata, KV_ID: mark_of(reference.key)}
    node.excluded_llm_metadata_keys = [*node.excluded_llm_metadata_keys, KV_ID]
    node.excluded_embed_metadata_keys = [*node.excluded_embed_metadata_keys, KV_ID]
    return NodeWithScore(node=node, score=item.score)


def texts_by_document(nodes: Iterable[BaseNode], mode: MetadataMode) -> dict[str, dict[str, str]]:
    """The texts of nodes, without blank ones: `{document_id: {node_id: text}}`."""
    documents: dict[str, dict[str, str]] = {}
    for node in nodes:
        text = text_of(node, mode)
        if not is_blank(text):
            documents.setdefault(document_of(node), {})[node.node_id] = text
    return documents


def source_hashes(nodes: Iterable[BaseNode]) -> dict[str, str]:
    """The hash of each document that nodes were made from, where they know it: `{document_id: hash}`."""
    sources = (node.relationships.get(NodeRelationship.SOURCE) for node in nodes)
    return {s.node_id: s.hash for s in sources if isinstance(s, RelatedNodeInfo) and s.hash}


def put_texts(
    memory: KVMemory,
    document_id: str,
    texts: Mapping[str, str],
    *,
    source_hash: str | None,
    replaces: bool = False,
    beside: bool = False,
    keep_text: bool | None = None,
) -> None:
    """Compress nodes of one document, `{node_id: text}`, beside its other nodes.

    With `replaces`, these are removed if their `source_hash` is another one, i.e. the document has changed, and a text
    that comes again belongs to the new node, because parsers make random node ids. With `beside`, the earlier texts of
    the same nodes stay too. `keep_text` is as in `KVMemory.add_passages`.
    """
    nodes = {id_: [key_of(text)] for id_, text in texts.items()}
    metadata: dict[str, Any] = {}
    with _lock(memory):
        if memory.store.has_document(document_id):
            metadata = memory.document(document_id).metadata
        known = metadata.get(_SOURCE_HASH) or source_hash
        has_changed = replaces and source_hash not in (None, known)
        if has_changed:
            metadata, known = {}, source_hash
        before = metadata.get(_NODES, {})
        if beside:
            nodes = {id_: [*before.get(id_, []), *keys] for id_, keys in nodes.items()}
        again = _keys(nodes) if replaces else set()
        nodes = {**{id_: keys for id_, keys in before.items() if not again.issuperset(keys)}, **nodes}
        memory.add_passages(
            document_id,
            list(texts.values()),
            metadata={**metadata, _NODES: nodes, _SOURCE_HASH: known},
            extend=not has_changed,
            drop=_keys(before) - _keys(nodes),  # keys of texts that nodes no longer have
            keep_text=keep_text,
        )


def _lock(memory: KVMemory) -> threading.Lock:
    """The lock held from reading a document's metadata to writing it: concurrent questions may compress nodes."""
    return _locks.setdefault(memory, threading.Lock())


def _keys(nodes: Mapping[str, Iterable[str]]) -> set[str]:
    return {key for keys in nodes.values() for key in keys}


def forget_nodes(memory: KVMemory, node_ids: Iterable[str]) -> None:
    """Remove the caches of single nodes; a text that another node of the document shares keeps its cache."""
    gone = set(node_ids)
    with _lock(memory):
        for summary in memory.documents():
            nodes = summary.metadata.get(_NODES, {})
            left = {node_id: keys for node_id, keys in nodes.items() if node_id not in gone}
            if len(left) == len(nodes):
                continue
            stale = _keys(nodes) - _keys(left)
            if any(passage.text_sha256 not in stale for passage in memory.document(summary.id).passages):
                metadata = {**summary.metadata, _NODES: left}
                memory.add_passages(summary.id, [], metadata=metadata, extend=True, drop=stale)
            else:
                memory.remove(summary.id)


def forget_all(memory: KVMemory) -> None:
    """Remove the documents that were added as nodes."""
    for summary in memory.documents():
        if _NODES in summary.metadata:
            memory.remove(summary.id)
