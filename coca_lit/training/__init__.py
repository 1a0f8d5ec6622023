"""How weights are learned, beside the network and its losses: optimizer, precision, memory, rewards, shards."""
