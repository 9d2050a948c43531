"""What a plan costs: seconds, bytes, joules, and how sure that is."""
