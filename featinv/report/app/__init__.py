"""The app: pictures in, samples, steering, composites and methods side by side, in a browser on this machine.

`layout` alone knows Gradio; `session` does the work on tensors and `models` holds what is loaded.
"""
