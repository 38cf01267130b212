"""Rows on disk: of shards, mapped; and what is known of each sample while a set is made. Memory does not grow with
them."""
