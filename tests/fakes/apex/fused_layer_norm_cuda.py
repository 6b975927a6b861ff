"""apex's CUDA extension; megalong looks whether it is there."""
