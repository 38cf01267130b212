"""What a run reports while it runs: scalars, texts and images to loggers, and a line a step.

Imports: errors, console, files, distributed, data, models.
"""
