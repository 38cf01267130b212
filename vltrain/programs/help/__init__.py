"""What helps at the command line: the list of recipes, and completion."""
