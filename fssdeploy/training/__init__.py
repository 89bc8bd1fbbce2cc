"""Training: losses, schedules, the loop with its checkpoints, and one file per recipe."""
