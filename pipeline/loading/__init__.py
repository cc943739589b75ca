"""From episodes to tensors: where features come from, batches of episodes, images kept in memory."""
