"""Starting Flower: simulations, deployments, and their ends."""
