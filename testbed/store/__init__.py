"""Contexts on disk or in an object store, and what describes them."""
