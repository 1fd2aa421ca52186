"""The student: presets, folders, blocks."""
