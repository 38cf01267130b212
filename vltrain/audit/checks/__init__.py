"""What an audit compares, a file a subject."""
