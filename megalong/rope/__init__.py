"""Rotary embeddings: which base a window needs (`theta`), and which frequencies follow from it (`frequencies`).

Nothing is imported here: the laws are plain arithmetic that the planner uses without loading torch.
"""
