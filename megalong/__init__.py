"""megalong: progressive long-context training of Llama checkpoints on megatron-core."""

__version__ = "0.1.0"
