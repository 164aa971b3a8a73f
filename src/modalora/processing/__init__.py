"""Bytes, text, pictures and sound into a Batch."""
