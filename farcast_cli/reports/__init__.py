"""The report on a run: one story in numbers, told as a page, a picture, Markdown or plain text.

story    the numbers, from a forecaster and (for the losses) the newest snapshot
panels   their words: for each panel a title, a sentence and a table
text, figures, svg, page   the forms; none of them computes anything
output   the file that a form is written to
"""
