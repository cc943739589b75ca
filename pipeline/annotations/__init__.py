"""Annotation formats of other tools: photos with marked classes in, found classes out."""
