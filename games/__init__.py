"""The games that the program ships: one class per file, as examples to copy."""
