"""What a run proves of itself: digests of what it was made from, a receipt of every step, and their verification.

Imports: errors, files, config, data.
"""
