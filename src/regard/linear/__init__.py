"""Linear attention, recurrences and memories: one file a paper."""
