known_implementations: dict[str, dict[str, str]]
