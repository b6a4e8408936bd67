"""Full-text search over passages: BM25 on words, or on their hashes if no text is stored."""
