"""Pages of `construct`: a report, and a page on which people check questions."""
