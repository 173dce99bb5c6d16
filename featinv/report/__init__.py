"""One self-contained HTML page for each run."""
