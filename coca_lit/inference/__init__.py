"""Using a trained model on one's own images: captions for files, folders and shards, and search in a folder."""
