"""Finding the best plan: which there are, which can be left out unseen, and which is chosen."""
