"""FP8 state, which stays off."""


class FP8GlobalStateManager:
    """megatron-core asks it whether FP8 is on."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """No."""
        return False


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: object = None,
    fp8_group: object = None,
    _graph: bool = False,
) -> None:
    """Not entered by what runs in bf16."""
    raise AssertionError("FP8 was not asked for")
