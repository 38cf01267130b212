"""Ranks and the machines that they run on: who this process is, what its device can do, leaving in time, hanging and
slow ranks.

Imports: errors, console, files.
"""
