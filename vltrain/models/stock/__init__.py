"""Any vision-language model of transformers (`AutoModelForImageTextToText`), as its family writes it."""
