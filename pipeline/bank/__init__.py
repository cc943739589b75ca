"""Annotated photos as a bank: what is kept of them, what is fitted to them, and how well that does on photos unseen."""
