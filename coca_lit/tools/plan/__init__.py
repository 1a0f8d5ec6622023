"""What a run will need, before it is started: parameters, FLOPs, memory, throughput and time on named GPUs."""
