"""Everything Ray, thin: a session, a runner with the contract of `pipeline.common.runner`, the distributed trainer."""
