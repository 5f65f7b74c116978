"""AdamW on full-precision master weights, gradient clipping and learning-rate schedules."""
