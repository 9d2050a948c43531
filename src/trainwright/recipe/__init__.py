"""The recipe: what a user wants trained. Schema, YAML with line numbers, presets."""
