"""The ingest pipeline: from documents to stored caches."""
