"""A Plan and a model become a model spread over workers."""
