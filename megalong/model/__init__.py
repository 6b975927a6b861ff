"""The Llama that is trained: its Hugging Face configuration, and how megatron-core builds it."""
