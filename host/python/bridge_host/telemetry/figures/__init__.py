"""Figures of what happened, as tables, plots and frames."""
