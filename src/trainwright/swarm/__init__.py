"""Training together over slow links: methods, rounds, transports, and whom to trust."""
