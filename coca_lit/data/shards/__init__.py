"""Image-text shards in webdataset's tar format: finding, caching, reading and writing them."""
