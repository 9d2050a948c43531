"""The planner: how a recipe is spread over a machine, what is legal, what it costs. No torch."""
