"""The feature store: zarr arrays, shard files, markers, growth, buckets mirrored here, and upkeep.

feature_store   open, read and write a store: what everything else calls
attributes      what a store says of itself; arrays: its zarr arrays as they must be; skeleton: makes both, by zarr
shard_file      a shard's bytes; buffers: memory to read into; shard_writer: a whole shard
markers         which shards are complete; summary: what all of them say, in one file; shard_table: asks either
growth          a data set that has more photos than its store
place           where it is: local_place, a folder; mirror, a bucket with its copy here (mirror_metadata, bucket, cache)
lease           who may write it: in a bucket the holder of a lease, in a folder the one of a lock (common/lock)
verify          is it whole; recompute: is it right; restore: mend its metadata; export: a small part of it
"""
