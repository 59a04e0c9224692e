"""What `evaluate` and `compare` found, made readable: tables for a terminal, and pages of HTML with the pictures."""

from autohdr.report.comparison import format_comparison, write_comparison
from autohdr.report.page import SHOWN_PAIRS, encode_pictures, write_page
from autohdr.report.tables import format_table

__all__ = ["SHOWN_PAIRS", "encode_pictures", "format_comparison", "format_table", "write_comparison", "write_page"]
