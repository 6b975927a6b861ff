"""One model in several layouts, Hugging Face's, megatron-core's and Meta's: one table of names, exact conversion."""
