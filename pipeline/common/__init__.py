"""What has no subject of this project: files written whole, seeded randomness, runners, process groups, pictures."""
