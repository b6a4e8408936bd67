"""Export and import of collections."""
