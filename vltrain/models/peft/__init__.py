"""peft's layers in our models, and folders in peft's layout."""
