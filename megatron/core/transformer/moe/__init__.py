"""Mixture of experts: router, dispatcher, stacked experts."""
