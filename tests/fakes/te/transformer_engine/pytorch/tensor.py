"""Tensor classes of FP8, of which there are no tensors."""


class QuantizedTensor:
    """megatron-core asks of each parameter whether it is one."""
