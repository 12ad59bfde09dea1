"""Finished runs as tables and figures."""

from jfed.reports import plots

__all__ = ["plots"]
