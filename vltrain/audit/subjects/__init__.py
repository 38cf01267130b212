"""What each architecture is compared with, a file each."""
