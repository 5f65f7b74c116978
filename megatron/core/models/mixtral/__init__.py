"""Mixtral: decoder-only transformer with sparse experts."""
