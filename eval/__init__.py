"""Evaluation from the shell: python -m eval.benchmark."""
