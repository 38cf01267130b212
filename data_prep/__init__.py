"""Raw data set -> samples (JSONL and images) -> packed shards. Runs on CPUs, before any training."""
