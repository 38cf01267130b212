"""Makes the tiny pretrained models that the quickstart tunes: see `python -m data_prep.pretrain --help`."""
