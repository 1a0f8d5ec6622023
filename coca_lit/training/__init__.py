"""How weights are learned: objectives, freezing, optimizer, gradient caching, sharding."""
