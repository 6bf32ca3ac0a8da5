"""A run folder -> one HTML page, plots, a model card and the terminal's closing screen.

`page.render_report(run)` and `terminal.summary(run)` are the two doors; `record` reads what a
run left, `standing` compares it with its floors and ceilings, `plots` draws.
"""
