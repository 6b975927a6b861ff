"""Slurm: what it is asked for, which nodes are fit, how a job's end is judged. No torch, but to check GPUs."""
