"""What a run is: its settings, its files, its place among stages, and whether its parts fit each other."""
