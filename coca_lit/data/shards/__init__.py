"""Image-text shards in webdataset's tar format: listing, indexing, streaming, caching."""
