"""What a user starts: each module is one program, `main(argv) -> exit code`. Above all other rooms.

Imports: errors, console, files, shipped, schema, batch, config, distributed, data, html, models, metrics, evaluate,
    receipts, memory, train, inference, harness, export, serve, audit, doctor, preflight, prepared, launching.
"""
