"""apex, as far as megatron-core and megalong import it."""
