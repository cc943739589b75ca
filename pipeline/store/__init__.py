"""The feature store: zarr arrays, shard files, markers, growth, buckets mirrored here, and upkeep."""
