"""Checks of a loss, its data and its weights: small rules with stable codes.

`case` understands a set-up once, the modules by family hold the rules, `registry` lists them, `run` goes through them.
"""
