"""Full-precision master weights, rules that update them, gradient clipping and learning-rate schedules."""
