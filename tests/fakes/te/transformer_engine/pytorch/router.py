"""Functions for experts, which a Llama has not."""


def _not_here(*args: object, **kwargs: object) -> None:
    raise AssertionError("a Llama has no experts")


fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = _not_here
