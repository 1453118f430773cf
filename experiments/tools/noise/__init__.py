"""What `gradient_noise` measures: baselines, the penalty of RLHF, and whole runs."""
