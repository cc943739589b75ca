"""Which photos meet: drawing episodes, the published ones, protocols by name, manifests."""
