"""A trained model on images of one's own: captions for files, folders and shards, and search in a folder."""
