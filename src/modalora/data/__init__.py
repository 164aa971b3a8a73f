"""Corpora and conversations: what the recipes read."""
