"""Cells of made-up notebooks, for the tests."""

from nbformat.v4 import new_code_cell, new_output
from nbformat.v4 import new_markdown_cell as markdown

__all__ = ["code", "markdown", "printed"]


def code(source, tags="", *outputs):
    return new_code_cell(source, metadata={"tags": tags.split()}, outputs=list(outputs))


def printed(words, name="stdout"):
    return new_output("stream", name=name, text=words)
