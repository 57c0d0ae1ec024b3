"""Choose the format of every layer group at one budget (no torch)."""
