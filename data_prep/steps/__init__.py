"""Steps of the data programs."""
