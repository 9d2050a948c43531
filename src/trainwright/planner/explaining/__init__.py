"""What `trainwright plan` says: the best plans, why others lost, what would change it."""
