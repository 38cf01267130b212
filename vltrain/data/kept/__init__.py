"""Features of images, kept on disk: what a run reads in the place of pictures."""
