"""Checkpoints: the trainer's own (store, pointer), Hugging Face's names and files, and conversion between them."""
