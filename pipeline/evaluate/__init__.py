"""The evaluate stage: a plan of what is tested and how, and the two loops that make rows and scores of it."""
