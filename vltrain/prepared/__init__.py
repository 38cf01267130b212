"""Prepared data: made where it is missing, and compared with what a recipe names where it is there."""
