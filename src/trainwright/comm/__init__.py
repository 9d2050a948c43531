"""Collectives that one can see and count."""
