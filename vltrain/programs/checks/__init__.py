"""What `vltrain check` can check, one file each."""
