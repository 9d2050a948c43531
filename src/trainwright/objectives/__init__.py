"""What is optimised: pure losses, each a sum and a weight."""
