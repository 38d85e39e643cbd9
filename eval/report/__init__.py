"""What users look at: one page of HTML (`page`), the same for a terminal (`terminal`) and as Markdown (`markdown`),
their tables, plots and contrasts, and a page to listen to.

`templates/` holds the HTML. Begin with `groups` (rows that may be compared) and `page`.
"""
