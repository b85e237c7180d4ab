"""Pictures, tables and pages: everything that turns results into something to look at."""
