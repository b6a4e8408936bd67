"""Full-text search over passages: BM25 on the hashes of their words."""
