"""From records to the page: checks, views, charts, words, templates. Imports neither torch nor what attacks."""

from ima_seg.evaluate.report.page import render, write_report

__all__ = ["render", "write_report"]
