"""Starting several ranks of a program on this machine.

Imports: errors, console, files, shipped, schema, config, inference.
"""
