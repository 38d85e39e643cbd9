"""What users look at: one page of HTML (`page`), its tables, plots and contrasts, the same as Markdown, and a page to
listen to.

`templates/` holds the HTML. Begin with `page`.
"""
