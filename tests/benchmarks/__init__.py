"""Measurements, one command each: JSON and a table. Nothing here is asserted on time."""
