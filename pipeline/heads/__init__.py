"""Who answers an episode: run configurations, run directories, checkpoints, segmenters by name."""
