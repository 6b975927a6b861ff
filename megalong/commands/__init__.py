"""What a user starts: each module is one command, `megalong-plan` for `plan.py` (`tools/plan.py` in a checkout).

What works on a stage (plan, verify, find_theta, prepare_data; and the trainer) takes settings, with Hydra's flags: a
command line of one is one of another. What works on files (convert, evaluate, and prepare_data's other forms) takes
options, with typer's.
"""
