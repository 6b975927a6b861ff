"""What a run can be told: one dataclass per group of conf/."""
