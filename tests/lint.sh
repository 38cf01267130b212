#!/usr/bin/env bash
# Style, lint and types: ruff and (based)pyright, as pyproject.toml sets them. About a minute, nearly all of it types.
# .basedpyright/baseline.json lists the findings of modules that are not strict. It may only shrink: a new finding fails, and so does an entry
# that is no longer found; after mending some, `.venv/bin/basedpyright` takes them out of it.
# git runs the same before a commit, if you ask for it: pip install pre-commit && pre-commit install
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/basedpyright --baselinemode=lock
