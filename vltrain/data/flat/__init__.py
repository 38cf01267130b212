"""What is known of each sample while a data set is made, on disk: memory does not grow with the samples."""
