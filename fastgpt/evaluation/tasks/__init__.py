"""Tasks of input and output: examples, templates, metrics, evaluation.

A task is a file of `templates/`; its embedded examples, if it has any, are a function of `embedded.py`.
"""
