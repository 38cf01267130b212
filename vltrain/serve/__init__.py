"""A tuned model behind HTTP: OpenAI's chat completions, and a page to chat on.

Imports: errors, files, schema, data, evaluate, receipts, inference.
"""
