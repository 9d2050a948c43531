"""The loop and what it needs: launching, hooks, metrics, evaluation, the run directory."""
