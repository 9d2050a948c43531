"""Saved state: sharded files, commit and hashes, export."""
