"""A trained model on your own images: captions for files, folders and shards, and search in a folder."""
