"""One stage, trained: where it starts, the step, the loop around it, what it reports."""
