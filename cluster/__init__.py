"""Everything Ray, thin: a session, a runner with the contract of `pipeline.runner`, the distributed trainer."""
