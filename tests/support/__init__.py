"""What several tests share: tiny models, packs made by hand, and groups of real processes."""
