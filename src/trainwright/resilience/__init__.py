"""Surviving: who is alive, who waits for whom, and what is said and done when a rank fails."""
