"""Papers that choose from the content where to attend: one file a paper."""
