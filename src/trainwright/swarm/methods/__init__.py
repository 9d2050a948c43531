"""What peers exchange and what they make of it, a file for each method."""
