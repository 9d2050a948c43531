"""How peers reach each other: a folder or bucket that all can use, or each other directly."""
