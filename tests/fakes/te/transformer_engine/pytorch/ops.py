"""Operators that fuse by themselves, which megatron-core names in annotations."""


class Sequential:
    """Not made: `use_transformer_engine_op_fuser` stays off."""


class FusibleOperation:
    """The base of its operators."""
