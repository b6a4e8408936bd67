"""The catalog: SQL tables, connections, transactions and locks."""
