"""Papers about where and how to attend that need no look at the content: one file a paper."""
