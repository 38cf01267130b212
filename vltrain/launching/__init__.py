"""Starting several ranks of a program on this machine."""
