"""Packs at an fsspec address (`s3://`, `gs://`, `https://`, ...), of which blocks are fetched ahead of use into a
bounded local cache, each checked by its digest."""
