"""What a run leaves on disk, and how the same command resumes it."""
