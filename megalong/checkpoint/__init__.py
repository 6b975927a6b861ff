"""What the trainer writes and resumes: checkpoints on their way to disk and back, their records, the newest one."""
