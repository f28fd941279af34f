"""Words for numbers: what a loss of one batch is made of, and what an unknown loss function reduces to.

`explanation` makes frozen dataclasses from the breakdown of a batch, `text` and `html` show them; `fingerprint` probes
a function. Rules that judge data and settings will be a module here each, `checks*.py`.
"""
