"""The endless stream of packs that a run takes its steps from: one set in an order of its own, or several, mixed."""
