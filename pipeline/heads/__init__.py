"""Who answers an episode: run configurations, training recipes, run directories, checkpoints, segmenters by name."""
