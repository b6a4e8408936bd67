"""From documents to stored caches."""
