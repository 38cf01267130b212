"""What a recipe would need before anybody pays for it: time and communication beside memory, and the cheapest changes
that would make it fit."""
