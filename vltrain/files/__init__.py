"""What is done with files whoever they belong to: digests, locks, strict reading. Knows nothing of vltrain but its
errors.

Imports: errors.
"""
