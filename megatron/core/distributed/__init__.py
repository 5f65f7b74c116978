"""Gradient accumulation and its reduction over data-parallel ranks."""
