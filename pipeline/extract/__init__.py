"""The extraction stage: what is to be made, and the worker that runs the backbone over one shard after another."""
