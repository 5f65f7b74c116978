"""What torch and its libraries bring where it is better than the formula, or can do more; a module for each device."""
