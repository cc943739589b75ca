"""Rows of an evaluation, and what is computed from them: bootstrap intervals, paired tests, spreads."""
