"""Codecs: vectors of fp32 as few bytes, truly packed, the same on every machine."""
