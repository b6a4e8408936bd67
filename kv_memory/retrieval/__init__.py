"""Full-text search over passages: BM25 on words, or on their hashes where no text is stored."""
