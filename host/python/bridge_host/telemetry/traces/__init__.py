"""Traces: spans put together from events, and drawn."""
