"""What a run leaves on the disk, and how the same command goes on from it."""
