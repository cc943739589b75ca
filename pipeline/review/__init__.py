"""The review stage: what prediction wrote, looked at, corrected, and predicted again from the corrections."""
