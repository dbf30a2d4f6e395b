"""The report of a run: one self-contained HTML file and its figures."""

from kvstream.testbed.report.page import write

__all__ = ["write"]
