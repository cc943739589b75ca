"""How photos go through the backbone: the same way in extraction, training on the fly and prediction."""

from __future__ import annotations

BATCH = {"cpu": 1, "cuda": 16}
"""Images per forward pass. Not an option: another number changes last bits (8e-6 of SqueezeNet at 64 px).

On a CPU one image at a time is also the fastest at real sizes, and a photo's features then depend on no other.
"""
