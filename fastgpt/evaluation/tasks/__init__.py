"""Tasks with inputs and outputs: examples, templates, metrics, evaluation.

A task is a file of `templates/`; its embedded examples, if it has any, are generated in `embedded.py`.
"""
