"""The predict stage: masks of new photos from a few photos with masks."""
