"""The machine that a plan is made for: devices, links, and what they reach."""
