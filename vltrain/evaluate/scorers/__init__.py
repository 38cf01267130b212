"""What answers are worth: one file a measure."""
