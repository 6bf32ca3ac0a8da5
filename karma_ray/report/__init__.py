"""The report of a run: an HTML page, plots, a model card, and the closing screen of a job.

`page.render_report(run)` and `terminal.summary(run)` are the entry points; `record` reads the files
of a run, `standing` compares it with floors and ceilings, and `plots` draws.
"""
