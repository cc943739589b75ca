"""How photos go through the backbone: the same way in extraction, training on the fly and prediction."""

from __future__ import annotations

BATCH = {"cpu": 1, "cuda": 16}
"""Images per forward pass. Not an option: another number changes last bits (8e-6 of SqueezeNet at 64 px).

On a CPU one image at a time is also the fastest at real sizes, and a photo's features then depend on no other.
"""

READ_AHEAD = 4
"""Photos read and brought to network size before they are needed, or a batch if that is more: 2 MB each at 400 px."""
